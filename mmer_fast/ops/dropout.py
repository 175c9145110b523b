"""Dropout whose mask is never stored, alone and after a ReLU. A helper of the models, not a public operator.

On a CPU one kernel (csrc/dropout.cpp) draws and multiplies, 16 bits an element, and the backward pass draws the same
numbers again or, after a ReLU, reads off the output what was kept; torch draws one number an element, serially, and
stores the mask. Elsewhere, and without the compiled library, these are torch's own functions.

The mask depends on a seed, drawn from torch's generator, and on the index of an element alone; p is rounded to a
multiple of 2⁻¹⁶.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.ops import _backends, _validate
from mmer_fast.ops._autograd import Differentiable, one_by_one
from mmer_fast.ops._library import define, operator_of, qualified
from mmer_fast.ops.attention_checks import drawn_seed
from mmer_fast.ops.philox import dropout_scale

_COMPILED = _backends.unavailable_reason("cpu", "cpu") is None


def dropout(x: Tensor, p: float) -> Tensor:
    """Each element is 0 with probability `p`, else divided by the share kept; nothing is drawn where `p` is 0.

    Args:
        x: any shape, floating.
        p: in [0, 1).

    Returns:
        The shape and dtype of `x`; `x` itself where `p` is 0.
    """
    if p == 0:
        return x
    return _DROPOUT(x, p, drawn_seed(p, x.device)) if has_kernel(x) else F.dropout(x, p)


def relu_dropout(x: Tensor, bias: Tensor | None, p: float) -> Tensor:
    """``dropout(relu(x + bias), p)``.

    Args:
        x: (..., D), floating.
        bias: (D,), or None: 0.
        p: in [0, 1).

    Returns:
        The shape and dtype of `x`.
    """
    if not has_kernel(x):
        return F.dropout(F.relu(x if bias is None else x + bias.to(x.dtype)), p)
    return _RELU_DROPOUT(x, None if bias is None else bias.to(wide(x)), p, drawn_seed(p, x.device))


def has_kernel(x: Tensor) -> bool:
    """Whether the kernels of this module and of those that build on it serve `x`."""
    return _COMPILED and x.device.type == "cpu" and x.dtype in _validate.FLOATING


def wide(x: Tensor) -> torch.dtype:
    """The dtype of the kernels' rows (D,) and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def redraw(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """`dropout` with the mask of a seed; the identity without one. On a CPU alone."""
    return x if seed is None else _DROPOUT(x, p, seed)


def _fake_dropout(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup_dropout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _differentiate_dropout(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    return _DROPOUT(grad, ctx.p, seed), None, None


def _fake_relu_dropout(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_relu_dropout_backward(grad: Tensor, out: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape), out.new_empty(out.shape[-1:], dtype=wide(out))


def _setup_relu_dropout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, ctx.p, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(output)


def _differentiate_relu_dropout(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (out,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: linear in the gradient
        grad_x = torch.where(out <= 0, 0, grad * dropout_scale(ctx.p))
        grad_bias = grad_x.to(wide(out)).flatten(0, -2).sum(0) if out.dim() > 1 else grad_x.to(wide(out))
    else:
        grad_x, grad_bias = _RELU_DROPOUT_BACKWARD(grad, out, ctx.p)
    return grad_x, grad_bias if ctx.has_bias else None, None, None


define("dropout", "(Tensor x, float p, Tensor seed) -> Tensor")
define("relu_dropout", "(Tensor x, Tensor? bias, float p, Tensor? seed) -> Tensor")
define("relu_dropout_backward", "(Tensor grad, Tensor out, float p) -> (Tensor grad_x, Tensor grad_bias)")
torch.library.register_fake(qualified("dropout"), _fake_dropout)
torch.library.register_fake(qualified("relu_dropout"), _fake_relu_dropout)
torch.library.register_fake(qualified("relu_dropout_backward"), _fake_relu_dropout_backward)
_RELU_DROPOUT_BACKWARD = operator_of("relu_dropout_backward")
torch.library.register_vmap(qualified("relu_dropout_backward"), one_by_one(_RELU_DROPOUT_BACKWARD))
_DROPOUT = Differentiable("dropout", _setup_dropout, _differentiate_dropout, one_by_one)
_RELU_DROPOUT = Differentiable(
    "relu_dropout",
    _setup_relu_dropout,
    _differentiate_relu_dropout,
    one_by_one,
)
