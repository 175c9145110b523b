"""Checks of arguments that the operators share. Each says the argument, what was expected and what came.

Values of tensors are read only where that is free of side effects: plain CPU tensors in eager mode. Under
``torch.compile``, ``torch.func`` and on CUDA (a host synchronisation) a bad value gives a NaN row instead, and a length
beyond the tensor counts as the whole.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def is_plain(tensor: Tensor) -> bool:
    """Whether this is an ordinary tensor, not one that a transform or a tracer wraps."""
    kind = type(tensor)
    return (kind is Tensor or kind is torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(
        tensor
    )


def can_read(tensor: Tensor) -> bool:
    """Whether the values may be looked at without a host synchronisation or a graph break."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu" and is_plain(tensor)


def floating_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")
    return value


def dense_tensor(name: str, value: object) -> Tensor:
    tensor = floating_tensor(name, value)
    if tensor.layout is not torch.strided or tensor.is_nested:  # a nested one may say that it is strided
        got = "a nested tensor" if tensor.layout is torch.strided else tensor.layout
        raise TypeError(f"{name} must be a dense tensor, with lengths where rows are ragged, got {got}")
    return tensor


def integer_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype not in _INTEGERS:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an integer tensor, got {got}")
    return value


def bool_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a bool tensor, got {got}")
    return value


def bool_or_floating_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or not (value.dtype == torch.bool or value.dtype in FLOATING):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a bool or floating-point tensor, got {got}")
    return value


def flag(name: str, value: object) -> bool:
    if type(value) is not bool and not isinstance(value, torch.SymBool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value  # type: ignore[return-value]


def tensors(name: str, value: object) -> list[Tensor]:
    """The entries of a sequence or iterator that holds nothing but tensors."""
    if isinstance(value, Tensor) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of tensors, got {type(value).__name__}")
    entries = list(value)
    for i, entry in enumerate(entries):
        if not isinstance(entry, Tensor):
            raise TypeError(f"{name}[{i}] must be a torch.Tensor, got {type(entry).__name__}")
    return entries


def number(
    name: str,
    value: object,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> float:
    usual = type(value) is float or type(value) is int  # asking the abstract class is slow
    if not usual and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    result = float(value)  # type: ignore[arg-type]
    _check_range(name, result, minimum, maximum, above)
    return result


def _check_range(
    name: str, value: float, minimum: float | None, maximum: float | None, above: float | None, row: str = ""
) -> None:
    if minimum is not None and maximum is not None and not minimum <= value <= maximum:
        raise ValueError(f"{name} must be within [{minimum:g}, {maximum:g}]{row}, got {value:g}")
    if above is not None and not above < value < math.inf:
        raise ValueError(f"{name} must be finite and > {above:g}{row}, got {value:g}")


def row_number(
    name: str,
    value: object,
    scores: Tensor,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> tuple[Tensor | None, float]:
    """A number, or one number a row.

    Returns:
        ``(None, number)``, or ``(float64 tensor of shape (rows,), 0.0)``.
    """
    if not isinstance(value, Tensor):
        if torch.compiler.is_compiling():
            return _row_number_of_graph(name, value, scores, minimum, maximum, above)
        return None, number(name, value, minimum=minimum, maximum=maximum, above=above)
    batch_shape = scores.shape[:-1]
    if value.dtype not in FLOATING and value.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be a floating-point or integer tensor, got {value.dtype}")
    same_device(name, value, scores, "scores")
    shape = value.shape
    if shape != batch_shape and (len(shape) > len(batch_shape) or not _broadcasts(shape, batch_shape)):
        raise ValueError(
            f"{name} must broadcast to the batch shape {tuple(batch_shape)} of scores {tuple(scores.shape)}, "
            f"got {tuple(shape)}"
        )
    if value.numel() > 0 and can_read(value):
        for extreme in value.detach().aminmax():
            _check_range(name, float(extreme), minimum, maximum, above, " in every row")
    wide = value.to(torch.float64)
    if len(batch_shape) != 1 or shape != batch_shape:
        wide = wide.expand(batch_shape).flatten()
    return wide, 0.0  # not NaN, which packages of AOTInductor cannot hold


def _row_number_of_graph(
    name: str, value: object, scores: Tensor, minimum: float | None, maximum: float | None, above: float | None
) -> tuple[Tensor | None, float]:
    """`row_number` of a number. One that follows from sizes or arguments of the graph becomes a tensor, unread.

    An operator has its numbers built in: the graph would serve this size alone, and be made anew for every other one.
    """
    from torch.fx.experimental.symbolic_shapes import has_static_value

    symbolic = isinstance(value, (torch.SymInt, torch.SymFloat))
    result = torch.sym_float(value) if symbolic else number(name, value)
    if has_static_value(result):
        _check_range(name, result, minimum, maximum, above)
        return None, result
    rows = torch.full((math.prod(scores.shape[:-1]),), result, dtype=torch.float64, device=scores.device)
    return rows, 0.0


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False))


def ragged(scores: Tensor, lengths: Tensor | None, mask: Tensor | None) -> None:
    """Checks `lengths` (...) integers within [0, n], or `mask` (..., n) bool; not both."""
    if lengths is None and mask is None:
        return
    if lengths is not None and mask is not None:
        raise ValueError("lengths and mask are alternatives, got both")
    batch_shape, n = scores.shape[:-1], scores.shape[-1]
    if lengths is not None:
        integer_tensor("lengths", lengths)
        same_device("lengths", lengths, scores, "scores")
        if lengths.shape != batch_shape:
            raise ValueError(
                f"lengths must have the batch shape {tuple(batch_shape)} of scores {tuple(scores.shape)}, "
                f"got {tuple(lengths.shape)}"
            )
        if can_read(lengths):
            lengths_within("lengths", lengths, "n", n)
    if mask is not None:
        bool_tensor("mask", mask)
        same_device("mask", mask, scores, "scores")
        if mask.shape != scores.shape:
            raise ValueError(f"mask must have the shape {tuple(scores.shape)} of scores, got {tuple(mask.shape)}")


def same_device(name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    on_device(name, tensor, other.device, other_name)


def on_device(name: str, tensor: Tensor, device: torch.device, whose: str) -> None:
    """Checks that `tensor` is on `device`, that of `whose`."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of {whose} ({device}), got {tensor.device}")


def lengths_within(name: str, lengths: Tensor, letter: str, n: int) -> None:
    """Checks that all `lengths` are within [0, n]; reads them. `letter` is what the dimension is called."""
    if lengths.numel() == 0:
        return
    low, high = (int(x) for x in lengths.aminmax())
    if low < 0 or high > n:
        flat = lengths.reshape(-1)
        row = int((flat < 0).logical_or(flat > n).nonzero()[0])
        raise ValueError(f"{name} must be within [0, {letter}={n}], got {int(flat[row])} in row {row}")


def counts_within(k_row: Tensor | None, k_value: float, lengths: Tensor | None, mask: Tensor | None) -> None:
    """Checks k <= the number of valid entries of every row."""
    if lengths is None and mask is None:
        return
    given = lengths if lengths is not None else mask
    assert given is not None
    if not can_read(given) or (k_row is not None and not can_read(k_row)):
        return
    count = lengths.reshape(-1) if lengths is not None else given.sum(-1).reshape(-1)
    beyond = (k_value if k_row is None else k_row) > count
    if bool(beyond.any()):
        row = int(beyond.nonzero()[0])
        got = k_value if k_row is None else float(k_row[row])
        raise ValueError(f"k must be within [0, {int(count[row])}], the valid entries of row {row}, got {got:g}")


def no_nan_rows(name: str, threshold: Tensor) -> None:
    """Checked mode: a row whose threshold is NaN had a NaN, an infinity or a k or epsilon out of range."""
    if torch.compiler.is_compiling() or not is_plain(threshold):
        return
    bad = threshold.detach().isnan()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name} must be free of NaN and of infinities that would always be chosen; row {row} is not")
