"""How results and gradients of a module are compared: with those of the same weights and arguments in float64.

Its layers round as torch's do, whatever computes the attention between them. So an error may be twice that of the same
module and dtype with the reference's attention, which computes in float64; ROUNDINGS of attention's own come on top.
In half types these are no more than the layers around have; in float32 the layers behind, each with a LayerNorm that
multiplies by up to eps^-1/2 = 3.2 and dropout that multiplies by 2, make more of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from drawn_tensors import Arguments
from fuzzed_gradients import LARGEST_UPSTREAM, Gradients, mapped, with_gradients
from gradient_bounds import unit
from torch import Tensor

import mmer_fast as mf

ROUNDINGS = {torch.float64: 256, torch.float32: 256, torch.bfloat16: 16, torch.float16: 16}


def check_module(
    function: Callable[..., Any], arguments: Arguments, seed: int, results: list[Tensor], found: Gradients
) -> None:
    wide = {name: mapped(Tensor.double, value) for name, value in arguments.items()} | {"wide": True}
    with mf.use_backend("reference"):
        exact = with_gradients(function, wide, seed)
        plain = with_gradients(function, arguments, seed)
    dtype = arguments["options"]["dtype"]
    for got, near, want in zip(results, plain[0], exact[0], strict=True):
        check_close("the result", dtype, got, near, want, 1.0)
    for name in found:
        size = LARGEST_UPSTREAM / (least_of(arguments[name]) if name == "key_weights" else 1.0)
        for got, near, want in zip(found[name], plain[1][name], exact[1][name], strict=True):
            check_close(f"the gradient of {name}", dtype, got, near, want, size)


def least_of(weights: Tensor | None) -> float:
    """The least key weight above 0: the gradient of a weight is a part of the attention, divided by that weight."""
    return 1.0 if weights is None else min(weights[weights > 0].tolist(), default=1.0)


def check_close(what: str, dtype: torch.dtype, got: Tensor, near: Tensor, want: Tensor, size: float) -> None:
    """`size` is that of what rounding errors are made of."""
    if got.numel() == 0:
        return
    own = ROUNDINGS[dtype] * unit(dtype) * max(size, float(want.abs().max()))
    allowed = 2 * float((near - want).abs().max()) + own
    assert float((got - want).abs().max()) <= allowed, f"{what} is {got} and not {want}, for which {allowed} is allowed"
