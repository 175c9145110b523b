"""Attention with soft key weights, on padded and on packed batches.

    p_ij = m_j e^(x_ij) / sum_l m_l e^(x_il),   x_ij = scale q_i . k_j + b_ij,   o_i = sum_j p_ij v_j

Padding costs nothing: padded queries and padded, masked or zero-weight keys are skipped. The weights m (a soft temporal
mask, for instance) have a gradient that is reduced over queries inside the kernel, so no (L, S) array ever exists.

The way of a call: a function here validates and chooses a backend; `attention_operators.FORWARD` runs the dispatcher's
operator, whose kernel is csrc/attention.cpp (CPU, CUDA), kernels/triton/attention.py or ops/attention_padded.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmer_fast.ops import _backends, _validate
from mmer_fast.ops import attention_checks as checks
from mmer_fast.ops.attention_inputs import Inputs, wide_dtype
from mmer_fast.ops.attention_operators import FORWARD, SUFFIX


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_weights: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    exact_zero_weight_grad: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention whose keys have weights, on a padded batch.

    ``o_i = sum_j p_ij v_j`` with ``p_ij = m_j e^(x_ij) / sum_l m_l e^(x_il)`` and ``x_ij = scale q_i . k_j + b_ij``:
    the softmax of ``x + log m``, written without the logarithm, so that dL/dm stays finite as m goes to 0. With weights
    of 0 and 1 it is `torch.nn.functional.scaled_dot_product_attention` with a boolean mask.

    First derivatives in `q`, `k`, `v`, `key_weights` and `bias` (and through `lse`) run on the backend and are
    deterministic; second ones run on the float64 reference. Under autocast `q`, `k` and `v` are cast to its dtype.

    Args:
        q: ``(B, H, L, D)``, float32, bfloat16 or float16; float64 on the reference backend. Any strides.
        k, v: ``(B, Hk, S, D)`` in the dtype of `q`. Hk divides H: key head h serves H/Hk consecutive query heads.
        key_weights: m, ``(B, S)`` or ``(B, H, S)`` in [0, 1], any floating dtype; used and differentiated in float32. A
            key of weight 0 is excluded: it may hold anything, NaN too.
        lengths: ``(B,)`` integers in [0, S]: only the first keys of a sample count.
        query_lengths: ``(B,)`` integers in [0, L]: only the first queries count; the others give 0 and cost nothing.
        mask: ``(B, S)`` bool, True at the keys that count; combines with `lengths` and `key_weights`.
        bias: b, ``(1|B, 1|H, 1|L, S)`` floating, used in float32; -inf excludes an entry.
        causal: query i sees the keys j <= i, as in PyTorch's function.
        scale: factor of the scores, finite; ``1/sqrt(D)`` unless given.
        dropout_p: probability in [0, 1), rounded to a multiple of 2⁻¹⁶, with which an entry of p is dropped; the others
            are divided by that of being kept.
        seed: of dropout, an integer in [0, 2^63) or an int64 tensor of one element; drawn from PyTorch's generator of
            the device unless given. The same seed drops the same entries on every backend and in both layouts.
        exact_zero_weight_grad: the true dL/dm also at keys of weight 0 (otherwise it is 0 there). They must be finite
            then, and the backward pass pays for them.
        return_lse: also return the log-sum-exp.
        backend: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``; None chooses (`mmer_fast.use_backend`).

    Returns:
        o, ``(B, H, L, D)`` in the dtype of `q`; with `return_lse` also ``lse_i = log sum_l m_l e^(x_il)``,
        ``(B, H, L)`` float32 (float64 for float64 `q`), which dropout does not touch. A query without a key, or beyond
        its length: o = 0, lse = -inf and no gradient.

    Raises:
        TypeError: a tensor of the wrong dtype, or something else where a tensor or a number belongs.
        ValueError: shapes or devices that disagree, lengths beyond the tensor, a dropout_p outside [0, 1); dropout
            without a seed while ``torch.use_deterministic_algorithms`` is on; in `mmer_fast.checked` mode weights
            outside [0, 1].
        BackendUnavailable: `backend` cannot serve these tensors.

    Examples:
        >>> q = torch.ones(1, 1, 1, 2)
        >>> v = torch.tensor([[[[1.0, 0.0], [3.0, 0.0]]]])
        >>> masked_attention(q, torch.zeros_like(v), v, torch.tensor([[1.0, 0.5]]))
        tensor([[[[1.6667, 0.0000]]]])
    """
    q, k, v = checks.tensors(q, k, v, "(B, H, L, D)")
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    checks.lengths("lengths", lengths, q, "S", keys)
    checks.lengths("query_lengths", query_lengths, q, "L", queries)
    checks.mask(mask, q, keys)
    checks.key_weights(key_weights, q, {"(B, S)": (batch, keys), "(B, H, S)": (batch, heads, keys)})
    return _attend(
        "masked_attention",
        Inputs(
            q,
            k,
            v,
            key_weights,
            mask,
            checks.bias(bias, q, (batch, heads, queries, keys)),
            None if lengths is None else lengths.to(torch.int64),
            None if query_lengths is None else query_lengths.to(torch.int64),
            None,
            None,
            queries,
            keys,
            _validate.flag("causal", causal),
            checks.scale(scale, q),
            checks.dropout_p(dropout_p),
            checks.seed(seed, dropout_p, q),
            _validate.flag("exact_zero_weight_grad", exact_zero_weight_grad),
        ),
        _validate.flag("return_lse", return_lse),
        backend,
    )


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_weights: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    exact_zero_weight_grad: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`masked_attention` on a packed batch: the tokens of all samples end to end, each sample attending to itself.

    What is not said here is as in `masked_attention`; `mmer_fast.packed_layout` makes cu_seqlens.

    Args:
        q: ``(Tq, H, D)``, the queries of all samples.
        k, v: ``(Tk, Hk, D)``.
        cu_seqlens_q: ``(B + 1,)`` int32 or int64 from 0 to Tq: sample b has the queries from ``cu_seqlens_q[b]`` up to
            ``cu_seqlens_q[b + 1]``.
        cu_seqlens_k: the same for the keys, from 0 to Tk; those of the queries unless given.
        max_seqlen_q, max_seqlen_k: length of the longest sample, or any upper bound. Unless given it is read from
            cu_seqlens, which on CUDA waits for the device; under ``torch.compile`` the bound is then Tq or Tk.
        key_weights: m, ``(Tk,)`` or ``(Tk, H)``.
        bias: ``(1|B, 1|H, 1|max_seqlen_q, max_seqlen_k)``, by positions within the sample.
        causal, scale, dropout_p, seed, exact_zero_weight_grad, return_lse, backend: as there; positions count within
            the sample.

    Returns:
        o, ``(Tq, H, D)``; with `return_lse` also lse, ``(Tq, H)``.

    Raises:
        TypeError, ValueError, BackendUnavailable: as there; cu_seqlens that decrease, do not start at 0 or do not
            end at the number of tokens (on the CPU, and in `mmer_fast.checked` mode everywhere); a maximum below the
            longest.

    Examples:
        >>> layout = packed_layout(torch.tensor([2, 1]))
        >>> tokens = torch.tensor([[1.0], [3.0], [7.0]])[:, None]
        >>> packed_attention(0 * tokens, tokens, tokens, layout.cu_seqlens).flatten()
        tensor([2., 2., 7.])
    """
    q, k, v = checks.tensors(q, k, v, "(Tq, H, D)")
    cu_seqlens_q, max_queries = checks.cu_seqlens("q", cu_seqlens_q, max_seqlen_q, q)
    if cu_seqlens_k is None:
        max_seqlen_k = max_queries if max_seqlen_k is None else max_seqlen_k
        cu_seqlens_k = cu_seqlens_q
    cu_seqlens_k, max_keys = checks.cu_seqlens("k", cu_seqlens_k, max_seqlen_k, k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        expected, got = tuple(cu_seqlens_q.shape), tuple(cu_seqlens_k.shape)
        raise ValueError(f"cu_seqlens_k must have the shape {expected} of cu_seqlens_q, got {got}")
    tokens, heads = k.shape[0], q.shape[1]
    checks.key_weights(key_weights, q, {"(Tk,)": (tokens,), "(Tk, H)": (tokens, heads)})
    return _attend(
        "packed_attention",
        Inputs(
            q,
            k,
            v,
            key_weights,
            None,
            checks.bias(bias, q, (cu_seqlens_q.shape[0] - 1, heads, max_queries, max_keys)),
            None,
            None,
            cu_seqlens_q,
            cu_seqlens_k,
            max_queries,
            max_keys,
            _validate.flag("causal", causal),
            checks.scale(scale, q),
            checks.dropout_p(dropout_p),
            checks.seed(seed, dropout_p, q),
            _validate.flag("exact_zero_weight_grad", exact_zero_weight_grad),
        ),
        _validate.flag("return_lse", return_lse),
        backend,
    )


def _attend(operator: str, inputs: Inputs, return_lse: bool, backend: str | None) -> Tensor | tuple[Tensor, Tensor]:
    """Settles dtypes and the backend, and calls."""
    q, wide = inputs.q, wide_dtype(inputs.q)  # TorchDynamo of torch 2.10 cannot trace a property of a named tuple
    m, b = (None if x is None else x.to(wide) for x in (inputs.key_weights, inputs.bias))
    name = _backends.select(operator, q.device.type, backend, _cannot(inputs), quiet=q.dtype == torch.float64)
    out, lse = FORWARD[SUFFIX[name]](*inputs._replace(key_weights=m, bias=b))
    return (out, lse) if return_lse else out


_FLOAT64 = dict.fromkeys(("cpu", "cuda", "triton"), "float64 is computed by the reference backend alone")


def _cannot(inputs: Inputs) -> dict[str, str]:
    """Backends that cannot serve these tensors, and why."""
    q = inputs.q
    if q.dtype == torch.float64:
        return _FLOAT64
    if not torch.compiler.is_compiling():  # as in soft_topk: the kernels check too
        longest = max(inputs.max_queries, inputs.max_keys)
        if longest > checks.LONGEST_SAMPLE:
            reason = f"serves samples of up to {checks.LONGEST_SAMPLE} tokens, not {longest}"
            return dict.fromkeys(("cpu", "cuda", "triton"), reason)
    if q.shape[-1] > checks.WIDEST_GPU_HEAD:
        reason = f"serves head widths up to {checks.WIDEST_GPU_HEAD}, not {q.shape[-1]}"
        return {"cuda": reason, "triton": reason}
    return {}
