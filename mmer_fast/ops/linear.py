"""A linear layer by the faster of torch's two CPU matrix products. A helper of the models, not a public operator.

For float32 torch takes MKL, which keeps to AVX2 on AMD processors: on one with AVX-512 oneDNN, which torch has too and
takes for bfloat16, is faster with the same precision (Zen 4: by 5 to 25 %; Zen 5: more than twice). So there, and for
products that are worth its call, this is oneDNN by way of the operator that torch's own compiler calls; everywhere else
`F.linear`. The gradients of weight and bias are those of torch's layer of oneDNN tensors, into which both factors are
copied first; with some thousand tokens that pays for itself (Zen 5, 1700 tokens: 1.35 times as fast as MKL at 128 x
128, 1.8 times at 512 x 512; 1000 tokens at 128 x 128: 0.9 times).
``torch.backends.mkldnn.flags(enabled=False)`` turns it off. oneDNN compiles a kernel for each new shape, within a
millisecond, and keeps the last thousand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.ops import _validate

_FEWEST_PRODUCTS = 1 << 21  # multiplications from which on the more expensive call pays
_FEWEST_GRADIENT_PRODUCTS = 3 << 23  # and from which on the copies pay


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
    operators = (torch.ops.mkldnn, "_linear_pointwise"), (torch.ops.aten, "mkldnn_linear_backward_weights")
    if not (torch.backends.mkl.is_available() and all(hasattr(space, name) for space, name in operators)):
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(capabilities.get("cpu_name", "")).startswith("AMD") and bool(capabilities.get("avx512_f"))


def has_bfloat16_products() -> bool:
    """Whether torch's products of bfloat16 on this CPU are its oneDNN's; else they take ten times those of float32."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())


_SLOW_WITH_MKL = _is_slow_with_mkl()


def _onednn_serves(*tensors: Tensor) -> bool:
    return (
        _SLOW_WITH_MKL
        and not torch.compiler.is_compiling()
        and all(x.dtype == torch.float32 and x.device.type == "cpu" and _validate.is_plain(x) for x in tensors)
        and torch._C._get_mkldnn_enabled()
    )


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    return (
        _onednn_serves(x, weight)
        and x.dim() == 2
        and x.shape[0] * weight.numel() >= _FEWEST_PRODUCTS
        and not torch.is_autocast_enabled("cpu")
    )


def _has_faster_gradients(grad: Tensor, x: Tensor) -> bool:
    return (
        _onednn_serves(grad, x)
        and grad.numel() * x.shape[1] >= _FEWEST_GRADIENT_PRODUCTS
        and not torch.is_grad_enabled()  # create_graph
        and torch._C._dispatch_keys(grad).has(torch._C.DispatchKey.CPU)  # not what is_grads_batched wraps
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _gradients_of_parameters(grad: Tensor, x: Tensor, weight: Tensor, needs_bias: bool) -> tuple[Tensor, Tensor | None]:
    of_weight, of_bias = torch.ops.aten.mkldnn_linear_backward_weights(
        grad.to_mkldnn(), x.to_mkldnn(), weight, needs_bias
    )
    return of_weight, of_bias if needs_bias else None


def gradients_of_parameters(
    grad: Tensor, x: Tensor, weight: Tensor, needs_weight: bool = True, needs_bias: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Of `weight` (H, D) and of a bias, from `grad` (N, H), that of ``x weight.T + bias``; None what is not needed."""
    if needs_weight and _has_faster_gradients(grad, x):
        return _gradients_of_parameters(grad, x, weight, needs_bias)
    return grad.T @ x if needs_weight else None, grad.sum(0) if needs_bias else None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        multiply = linear if torch.is_grad_enabled() else _product  # create_graph
        needs_x, *needed = ctx.needs_input_grad
        return multiply(grad, weight.T) if needs_x else None, *gradients_of_parameters(grad, x, weight, *needed)
