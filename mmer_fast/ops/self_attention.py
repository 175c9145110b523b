"""Self-attention of packed tokens by way of one product. A helper of the models, not a public operator.

    (q, k, v) = x weight.T + bias,   o = packed_attention(q, k, v)

On the CPU the backward pass writes the gradients of q, k and v side by side, as the products behind it read them, and
sums them over the tokens while it has them at hand, which is the gradient of the bias. Otherwise three gradients are
written, copied into one, and read once more for the bias. Whatever the kernel does not serve goes that way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmer_fast.ops import _backends, _validate
from mmer_fast.ops._autograd import one_by_one
from mmer_fast.ops._library import define, operator_of, qualified
from mmer_fast.ops.attention import packed_attention
from mmer_fast.ops.attention_inputs import Inputs
from mmer_fast.ops.attention_operators import FORWARD
from mmer_fast.ops.linear import gradients_of_parameters, linear

# The gradients (T, 3, H, E) in the dtype of q, and their sums over the tokens (3, H, E), float32.
define(
    "self_attention_backward",
    "(Tensor grad_out, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt longest, "
    "float scale, float dropout_p, Tensor? seed) -> (Tensor grads, Tensor sums)",
)


def _fake_backward(grad_out: Tensor, out: Tensor, lse: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, width = q.shape
    return q.new_empty((tokens, 3, heads, width)), q.new_empty((3, heads, width), dtype=torch.float32)


torch.library.register_fake(qualified("self_attention_backward"), _fake_backward)
_BACKWARD = operator_of("self_attention_backward")
torch.library.register_vmap(qualified("self_attention_backward"), one_by_one(_BACKWARD))


class _Heads(NamedTuple):
    """What `self_attention` takes beside the tensors that have gradients."""

    heads: int
    cu_seqlens: Tensor
    longest: int
    dropout_p: float
    seed: Tensor | None


_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def self_attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    heads: int,
    cu_seqlens: Tensor,
    longest: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Each sample's tokens attend to each other, by the queries, keys and values that one linear layer makes of them.

    Args:
        x: (T, D), the tokens of all samples end to end; float32, float64, bfloat16 or float16.
        weight: (3 H E, D): of the queries of all heads, then of the keys, then of the values; in the dtype of x.
        bias: (3 H E,), in the dtype of x.
        heads: H; each has the width E.
        cu_seqlens: (B + 1,) int32, from 0 to T.
        longest: tokens of the longest sample.
        dropout_p, seed: as for `mmer_fast.packed_attention`; the seed is a tensor, and given where `dropout_p` > 0.

    Returns:
        (T, H E), in the dtype of x, or of autocast.

    Raises:
        ValueError, RuntimeError: cu_seqlens that do not fit the tokens.
        BackendUnavailable: the backend that was chosen cannot serve these tensors.
    """
    options = _Heads(heads, cu_seqlens, longest, dropout_p, seed)
    if not _is_served(x, weight, bias):
        return _apart(x, weight, bias, options)
    out: Tensor = _SelfAttention.apply(x, weight, bias, options)
    return out.flatten(1)


def _is_served(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the CPU kernel computes a gradient here."""
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and all(y.dtype in _NARROW and _validate.is_plain(y) for y in (x, weight, bias))
        and (x.dtype == weight.dtype == bias.dtype or torch.is_autocast_enabled("cpu"))
        and (x.requires_grad or weight.requires_grad or bias.requires_grad)
        and _backends.select("packed_attention", "cpu", None) == "cpu"
    )


def _apart(x: Tensor, weight: Tensor, bias: Tensor, options: _Heads) -> Tensor:
    """The same by the public operator."""
    heads, cu_seqlens, longest, dropout_p, seed = options
    q, k, v = _split(linear(x, weight, bias), heads)
    out = packed_attention(q, k, v, cu_seqlens, max_seqlen_q=longest, dropout_p=dropout_p, seed=seed)
    assert isinstance(out, Tensor)
    return out.flatten(1)


def _split(product: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(T, 3 H E) as three (T, H, E)."""
    return product.unflatten(-1, (3, heads, -1)).unbind(1)


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, options: _Heads) -> Tensor:
        heads, cu_seqlens, longest, dropout_p, seed = options
        ctx.autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        given = x, weight, bias
        if ctx.autocast is not None:
            x, weight, bias = (y.to(ctx.autocast) for y in given)
        product = linear(x, weight, bias)
        q, k, v = _split(product, heads)
        scale = q.shape[-1] ** -0.5
        nothing = (None,) * 5
        inputs = Inputs(
            q, k, v, *nothing, cu_seqlens, cu_seqlens, longest, longest, False, scale, dropout_p, seed, False
        )
        out, lse = FORWARD[""](*inputs)
        ctx.save_for_backward(*given, x, weight, product, out, lse, cu_seqlens, seed)
        ctx.numbers = heads, longest, dropout_p, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *given, x, weight, product, out, lse, cu_seqlens, seed = ctx.saved_tensors
        heads, longest, dropout_p, scale = ctx.numbers
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph
            aliases = [y.view_as(y) for y in given]  # the hooks of what was given are for what is returned from here
            with torch.autocast("cpu", ctx.autocast, enabled=ctx.autocast is not None):
                options = _Heads(heads, cu_seqlens, longest, dropout_p, seed)
                again = _apart(aliases[0], aliases[1], aliases[2], options)
            leaves = [y for y, needed in zip(aliases, wanted, strict=True) if needed]
            found = iter(torch.autograd.grad(again, leaves, grad_out.flatten(1), create_graph=True))
            return *(next(found) if needed else None for needed in wanted), None
        q, k, v = _split(product, heads)
        grads, sums = _BACKWARD(grad_out, out, lse, q, k, v, cu_seqlens, longest, scale, dropout_p, seed)
        grad_product = grads.reshape(product.shape)  # unlike flatten, known to vmap
        grad_x = linear(grad_product, weight.T) if wanted[0] else None
        grad_weight, _ = gradients_of_parameters(grad_product, x, weight, wanted[1], needs_bias=False)
        return grad_x, grad_weight, sums.reshape(product.shape[1]) if wanted[2] else None, None
