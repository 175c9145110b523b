"""Gradient reversal: the identity forward, a negated gradient backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmer_fast.ops import _validate


class _GradReverse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * -ctx.scale, None


def grad_reverse(x: Tensor, scale: float = 1.0) -> Tensor:
    """The identity, whose gradient is multiplied by ``-scale`` (RobMMR Eq. 11; Ganin and Lempitsky 2015).

    Args:
        x: any shape, floating point.
        scale: factor >= 0 of the reversed gradient.

    Returns:
        A view of `x`.

    Raises:
        TypeError: `x` is not a floating-point tensor, or `scale` not a number.
        ValueError: `scale` is negative or not finite.
    """
    factor = _validate.number("scale", scale, minimum=0.0, maximum=float("inf"))
    if factor == float("inf"):
        raise ValueError("scale must be finite, got inf")
    return _GradReverse.apply(_validate.floating_tensor("x", x), factor)
