"""A linear layer by the faster of torch's two CPU matrix products. A helper of the models, not a public operator.

For float32 torch takes MKL, which keeps to AVX2 on AMD processors: on one with AVX-512 oneDNN, which torch has too and
takes for bfloat16, is faster with the same precision (Zen 4: by 5 to 25 %; Zen 5: more than twice). So there, and for
products that are worth its call, this is oneDNN by way of the operator that torch's own compiler calls; everywhere else
`F.linear`. The gradient of the weight stays with MKL: it is a product of two transposed matrices, which MKL reads as
they are, while oneDNN's operator wants them copied, which takes longer than the product up to a width of about 500.
``torch.backends.mkldnn.flags(enabled=False)`` turns it off. oneDNN compiles a kernel for each new shape, within a
millisecond, and keeps the last thousand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.ops import _validate

_FEWEST_PRODUCTS = 1 << 21  # multiplications that outweigh the dearer call


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight.T + bias``, as `torch.nn.functional.linear`.

    Args:
        x: (..., D), floating.
        weight: (H, D).
        bias: (H,), or None: 0.

    Returns:
        (..., H).
    """
    if not _is_faster(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def _is_slow_with_mkl() -> bool:
    """Whether this is an AMD processor with AVX-512, and torch has oneDNN."""
    if not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name", "")).startswith("AMD") and bool(capabilities.get("avx512_f"))


def has_bfloat16_products() -> bool:
    """Whether torch's products of bfloat16 on this CPU are its oneDNN's; else they take ten times those of float32."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())


_SLOW_WITH_MKL = _is_slow_with_mkl()


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    return (
        _SLOW_WITH_MKL
        and not torch.compiler.is_compiling()
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.dim() == 2
        and x.shape[0] * weight.numel() >= _FEWEST_PRODUCTS
        and _validate.is_plain(x)
        and _validate.is_plain(weight)
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    needs_x: bool,
    needs_weight: bool,
    multiply: Callable[[Tensor, Tensor], Tensor] = linear,
) -> tuple[Tensor | None, Tensor | None]:
    """Of `x` (N, D) and `weight` (H, D), from `grad` (N, H), that of ``x weight.T``; None what is not needed."""
    return multiply(grad, weight.T) if needs_x else None, grad.T @ x if needs_weight else None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        multiply = linear if torch.is_grad_enabled() else _product  # create_graph
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return *gradients(grad, x, weight, needs_x, needs_weight, multiply), grad.sum(0) if needs_bias else None
