"""`torch.nn.functional.scaled_dot_product_attention` on the kernels of `masked_attention`, with key weights.

Which mask costs what is decided here: a boolean mask that is the same for all queries and heads says which keys exist,
and those it hides are never touched; every other mask is a bias, which the kernel reads entry by entry.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.ops import _validate
from mmer_fast.ops.attention import masked_attention
from mmer_fast.ops.attention_checks import drawn_seed


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_weights: Tensor | None = None,
) -> Tensor:
    """Attention with the arguments and the meaning of PyTorch's function of this name.

    ``softmax(scale query keyᵀ + attn_mask) value``, with `key_weights` m ``p_ij = m_j e^(x_ij) / sum_l m_l e^(x_il)``.
    Derivatives, autocast and the choice of backend are those of `mmer_fast.masked_attention`.

    Args:
        query: ``(..., H, L, E)``, ``(H, L, E)`` or ``(L, E)``; float32, bfloat16, float16 or float64.
        key: ``(..., Hk, S, E)`` in the dtype of `query`; leading dimensions, and Hk of 1, broadcast.
        value: ``(..., Hk, S, Ev)``. Where Ev differs from E the narrower ones are filled up with zeros.
        attn_mask: bool, True where a query attends, or floating, added to the scores (with a gradient); at least two
            dimensions, broadcastable to ``(..., H, L, S)``.
        dropout_p: probability in [0, 1) with which a weight is dropped. Unlike a module, a function does not know
            whether it trains. Which ones are dropped depends on PyTorch's generator of the device.
        is_causal: query i attends to the keys j <= i (also where L and S differ).
        scale: factor of the scores; ``1/sqrt(E)`` unless given.
        enable_gqa: Hk may be a divisor of H; key head h serves H/Hk consecutive query heads.
        key_weights: m in [0, 1], ``(..., S)`` or ``(..., H, S)``, with a gradient; a key of weight 0 is excluded.

    Returns:
        ``(..., H, L, Ev)`` in the dtype of `query`; 0 for a query that attends to no key.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: shapes that do not go together; `attn_mask` beside `is_causal`, as PyTorch documents it.
        BackendUnavailable: the backend that was asked for cannot serve these tensors.

    Examples:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> scaled_dot_product_attention(0 * x, x, x, torch.tensor([[True, True], [False, True]])).flatten()
        tensor([2., 3.])
    """
    _validate.flag("enable_gqa", enable_gqa)
    if _validate.flag("is_causal", is_causal) and attn_mask is not None:
        raise ValueError("attn_mask and is_causal are alternatives, got both")
    _check(query, key, value)
    if isinstance(attn_mask, Tensor):
        _validate.same_device("attn_mask", attn_mask, query, "query")
    dims = max(x.dim() for x in (query, key, value))
    width, out_width = query.shape[-1], value.shape[-1]
    q, k, v, leading = _aligned(query, key, value, enable_gqa)
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    mask, bias = mask_and_bias(attn_mask, (*leading, heads, queries, keys))
    out = masked_attention(
        *same_width(q, k, v),
        _flat_weights(key_weights, leading, heads, keys),
        mask=mask,
        bias=bias,
        causal=is_causal,
        scale=max(width, 1) ** -0.5 if scale is None else scale,
        dropout_p=dropout_p,
        seed=drawn_seed(dropout_p, q.device),
    )
    assert isinstance(out, Tensor)
    out = out[..., :out_width].reshape(*leading, heads, queries, out_width)
    return out.squeeze(0) if dims == 2 else out


def mask_and_bias(attn_mask: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
    """An attention mask as `masked_attention` takes it: the keys that count, or else a bias.

    Args:
        attn_mask: bool (True attends) or floating, broadcastable to `shape`.
        shape: ``(..., H, L, S)``; B is the number of entries of the leading dimensions.

    Returns:
        ``(B, S)`` bool and None, or None and ``(1|B, 1|H, 1|L, S)`` floating; two None without a mask.

    Raises:
        TypeError, ValueError: a mask of another dtype or of a shape that does not broadcast.
    """
    if attn_mask is None:
        return None, None
    _validate.bool_or_floating_tensor("attn_mask", attn_mask)
    missing = len(shape) - attn_mask.dim()
    fits = attn_mask.dim() >= 2 and missing >= 0
    if not fits or any(n not in (1, full) for n, full in zip(attn_mask.shape, shape[missing:], strict=True)):
        raise ValueError(
            f"attn_mask must have at least two dimensions and broadcast to (..., H, L, S) = {tuple(shape)}, "
            f"got {tuple(attn_mask.shape)}"
        )
    x = attn_mask[(None,) * missing]
    is_leaf = attn_mask.requires_grad and attn_mask.grad_fn is None
    for dim in (-3, -2):  # what was expanded holds one entry, but a leaf has a gradient at each of its own
        if x.shape[dim] > 1 and x.stride(dim) == 0 and not is_leaf:
            x = x.narrow(dim, 0, 1)
    leading, keys = shape[:-3], shape[-1]
    if any(n > 1 for n in x.shape[:-3]):
        x = x.expand(*leading, *x.shape[-3:])
    x = x.expand(*x.shape[:-1], keys).reshape(math.prod(x.shape[:-3]), *x.shape[-3:-1], keys)
    if x.dtype != torch.bool:
        return None, x
    if x.shape[1] == x.shape[2] == 1:
        return x[:, 0, 0].expand(math.prod(leading), keys), None
    return None, torch.zeros(x.shape, device=x.device).masked_fill(~x, -torch.inf)


def same_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one head width: zeros at the end of q and k add nothing to the scores, those of v are cut off."""
    missing = v.shape[-1] - q.shape[-1]
    if missing > 0:
        return F.pad(q, (0, missing)), F.pad(k, (0, missing)), v
    return (q, k, F.pad(v, (0, -missing))) if missing < 0 else (q, k, v)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        _validate.dense_tensor(name, x)
        if x.dim() < 2:
            raise ValueError(f"{name} must have at least two dimensions, got {tuple(x.shape)}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype {query.dtype} of query, got {x.dtype}")
        _validate.same_device(name, x, query, "query")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have the head width {query.shape[-1]} of query, got {key.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must have the length {key.shape[-2]} of key, got {value.shape[-2]}")


def _aligned(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """(B, H, L, E), (B, Hk, S, E), (B, Hk, S, Ev) and the leading dimensions that B stands for."""
    three = [x if x.dim() > 2 else x[None] for x in (query, key, value)]
    try:
        leading = tuple(torch.broadcast_shapes(*(x.shape[:-3] for x in three)))
    except RuntimeError:
        got = ", ".join(str(tuple(x.shape)) for x in three)
        raise ValueError(f"query, key and value must have leading dimensions that broadcast, got {got}") from None
    q, k, v = (x.expand(*leading, *x.shape[-3:]).reshape(math.prod(leading), *x.shape[-3:]) for x in three)
    counts = q.shape[1], k.shape[1], v.shape[1]
    if 0 in counts:
        raise ValueError(f"query, key and value must have at least one head each, got {counts}")
    if enable_gqa:
        if any(counts[0] % n for n in counts[1:]):
            raise ValueError(f"key and value must have heads that divide the {counts[0]} of query, got {counts[1:]}")
        if counts[1] != counts[2]:
            k, v = (x.repeat_interleave(counts[0] // x.shape[1], dim=1) for x in (k, v))
        return q, k, v, leading
    heads = max(counts)
    if any(n not in (1, heads) for n in counts):
        raise ValueError(
            "query, key and value must have as many heads each (with enable_gqa=True those of key and value may divide "
            f"those of query), got {counts}"
        )
    q, k, v = (x.expand(-1, heads, -1, -1) for x in (q, k, v))
    return q, k, v, leading


def _flat_weights(key_weights: Tensor | None, leading: tuple[int, ...], heads: int, keys: int) -> Tensor | None:
    """The key weights as (B, S) or (B, H, S)."""
    if key_weights is None:
        return None
    _validate.floating_tensor("key_weights", key_weights)
    shared, own = (*leading, keys), (*leading, heads, keys)
    if tuple(key_weights.shape) not in (shared, own):
        raise ValueError(
            f"key_weights must have shape (..., S) = {shared} or (..., H, S) = {own}, got {tuple(key_weights.shape)}"
        )
    return key_weights.reshape(math.prod(leading), *key_weights.shape[len(leading) :])
