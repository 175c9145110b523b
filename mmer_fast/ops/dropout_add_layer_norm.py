"""What follows a branch of a Transformer block, in one pass over rows. A helper of the models, not a public operator.

    y = LayerNorm(residual + dropout(x + x_bias)) weight + bias

On a CPU a kernel (csrc/dropout_add_layer_norm.cpp) reads x and residual once, and the backward pass, which draws the
mask again, once more; unfused it is ten passes over memory and a call each. x_bias is the bias of the linear layer that
made x: adding it here saves writing and reading x once, and its gradient a pass over that of x. Elsewhere these are
torch's own functions.

What is kept for the backward pass are x and residual, and two numbers a row. A copy of the sum would be one write more
and no read less; y alone, which the next layer keeps anyway, gives the normalised row only where no weight is near 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.ops._autograd import Differentiable, one_by_one
from mmer_fast.ops._library import define, operator_of, qualified
from mmer_fast.ops.attention_checks import drawn_seed
from mmer_fast.ops.dropout import has_kernel, redraw, wide

_INPUTS = "Tensor x, Tensor? x_bias, Tensor residual, Tensor weight"


def dropout_add_layer_norm(
    x: Tensor, x_bias: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float
) -> Tensor:
    """``LayerNorm(residual + dropout(x + x_bias, p)) weight + bias`` over the last dimension, statistics in float32.

    Args:
        x: (..., D), floating.
        x_bias: (D,), or None: 0.
        residual: the shape of `x`.
        weight, bias: (D,), of the LayerNorm.
        eps: added to the variance.
        p: probability of being dropped, in [0, 1); nothing is drawn where it is 0.

    Returns:
        The shape of `x`, in the dtype to which `x` and `residual` promote.
    """
    if not (has_kernel(x) and has_kernel(residual)):
        x = x if x_bias is None else x + x_bias.to(x.dtype)
        return F.layer_norm(residual + F.dropout(x, p), weight.shape, weight, bias, eps)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    x, residual = x.to(dtype), residual.to(dtype)
    rows = (None if row is None else row.to(wide(x)) for row in (x_bias, weight, bias))
    x_bias, weight, bias = rows  # type: ignore[assignment]
    return _NORM(x, x_bias, residual, weight, bias, eps, p, drawn_seed(p, x.device))[0]


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])
    return x.new_empty(x.shape), x.new_empty((rows, 2), dtype=wide(x))


def _fake_backward(
    grad: Tensor, x: Tensor, x_bias: Any, residual: Any, weight: Tensor, moments: Any, p: float, seed: Any
) -> tuple[Tensor, ...]:
    row = weight.new_empty(weight.shape)
    grad_x = x.new_empty(x.shape if p > 0 else (0,))
    return grad_x, row, x.new_empty(x.shape), torch.empty_like(row), torch.empty_like(row)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, x_bias, residual, weight, _, ctx.eps, ctx.p, seed = inputs
    ctx.save_for_backward(x, x_bias, residual, weight, output[1], seed)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, x_bias, residual, weight, moments, seed = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph
        grads = _backward_in_torch(grad, x, x_bias, residual, weight, ctx.eps, ctx.p, seed)
    else:
        grads = _BACKWARD(grad, x, x_bias, residual, weight, moments, ctx.p, seed)
    grad_x, grad_x_bias, grad_residual, grad_weight, grad_bias = grads
    grad_x = grad_x if ctx.p > 0 else grad_residual
    return grad_x, None if x_bias is None else grad_x_bias, grad_residual, grad_weight, grad_bias, None, None, None


def _backward_in_torch(
    grad: Tensor,
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    """The first derivative by functions that have one themselves."""
    grad, branch = grad.to(weight.dtype), x.to(weight.dtype)
    s = residual.to(weight.dtype) + redraw(branch if x_bias is None else branch + x_bias, p, seed)
    centred = s - s.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    xhat, a = centred * rstd, grad * weight
    grad_s = rstd * (a - a.mean(-1, keepdim=True) - xhat * (a * xhat).mean(-1, keepdim=True))
    grad_x = redraw(grad_s, p, seed)
    sums = (rows.reshape(-1, weight.shape[0]).sum(0) for rows in (grad_x, grad * xhat, grad))
    grad_x_bias, grad_weight, grad_bias = sums
    return grad_x.to(x.dtype), grad_x_bias, grad_s.to(x.dtype), grad_weight, grad_bias


define(
    "dropout_add_layer_norm",
    f"({_INPUTS}, Tensor bias, float eps, float p, Tensor? seed) -> (Tensor y, Tensor moments)",
)
define(
    "dropout_add_layer_norm_backward",
    f"(Tensor grad, {_INPUTS}, Tensor moments, float p, Tensor? seed) "
    "-> (Tensor grad_x, Tensor grad_x_bias, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
)
torch.library.register_fake(qualified("dropout_add_layer_norm"), _fake_forward)
torch.library.register_fake(qualified("dropout_add_layer_norm_backward"), _fake_backward)
_BACKWARD = operator_of("dropout_add_layer_norm_backward")
torch.library.register_vmap(qualified("dropout_add_layer_norm_backward"), one_by_one(_BACKWARD))
_NORM = Differentiable(
    "dropout_add_layer_norm",
    _setup_context,
    _differentiate,
    one_by_one,
)
