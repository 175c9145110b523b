"""What the weight perturbation refuses, in words that name the argument, what was expected and what came."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mmer_fast.ops import _validate
from mmer_fast.ops import perturbation_reference as reference

SCOPES = {"global": reference.GLOBAL, "tensor": reference.TENSOR, "awp": reference.AWP}
_PLAIN = (Tensor, torch.nn.Parameter)


def check_radius(radius: object) -> float:
    """`radius` as a float.

    Raises:
        TypeError, ValueError: it is not a number >= 0 and finite.
    """
    value = _validate.number("radius", radius)
    if not 0 <= value < float("inf"):
        raise ValueError(f"radius must be finite and >= 0, got {value:g}")
    return value


def scope_number(scope: str, adaptive: bool) -> int:
    """`scope` as the schemas have it.

    Raises:
        ValueError: an unknown scope, or one that does not go with `adaptive`.
    """
    _validate.flag("adaptive", adaptive)
    if not isinstance(scope, str) or scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}, got {scope!r}")
    if adaptive and scope == "awp":
        raise ValueError("adaptive goes with scope 'global' or 'tensor', got 'awp', which scales by |w| already")
    return SCOPES[scope]


def some_tensors(name: str, value: Sequence[Tensor]) -> list[Tensor]:
    tensors = _validate.tensors(name, value)
    if not tensors:
        raise ValueError(f"{name} must hold at least one tensor, got none")
    return tensors


def check_norm(grads: list[Tensor], params: list[Tensor]) -> None:
    _dense("grads", grads)
    if params:
        _fit("params", params, "grads", grads, dtype=False)


def check_perturb(params: list[Tensor], grads: list[Tensor], stash: list[Tensor]) -> None:
    _dense("params", params)
    _fit("grads", grads, "params", params, dtype=False)
    _fit("stash", stash, "params", params, dtype=True)
    check_distinct({"params": params, "stash": stash})


def check_restore(params: list[Tensor], stash: list[Tensor]) -> None:
    _dense("params", params)
    _fit("stash", stash, "params", params, dtype=True)
    check_distinct({"params": params, "stash": stash})


def _dense(name: str, tensors: list[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        _validate.floating_tensor(f"{name}[{i}]", tensor)
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}[{i}] must be dense, got {tensor.layout}")
        if tensor.device != tensors[0].device:
            expected = tensors[0].device
            raise ValueError(f"{name}[{i}] must be on the device of {name}[0] ({expected}), got {tensor.device}")


def _fit(name: str, tensors: list[Tensor], other: str, others: list[Tensor], *, dtype: bool) -> None:
    if len(tensors) != len(others):
        raise ValueError(f"{name} must hold a tensor for each of the {len(others)} {other}, got {len(tensors)}")
    _dense(name, tensors)
    _validate.same_device(f"{name}[0]", tensors[0], others[0], other)
    for i, (tensor, like) in enumerate(zip(tensors, others, strict=True)):
        if tensor.shape != like.shape:
            raise ValueError(
                f"{name}[{i}] must have the shape {tuple(like.shape)} of {other}[{i}], got {tuple(tensor.shape)}"
            )
        if dtype and tensor.dtype != like.dtype:
            raise ValueError(f"{name}[{i}] must have the dtype {like.dtype} of {other}[{i}], got {tensor.dtype}")


def check_distinct(lists: dict[str, list[Tensor]], names: Sequence[str] | None = None) -> None:
    """Checks that no two tensors share memory, and that none is expanded: each entry is written once.

    Args:
        names: what to call the tensors of a single list; without, they are ``list[index]``.

    Raises:
        ValueError: naming the tensors.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return
    spans = []
    for name, tensors in lists.items():
        for i, t in enumerate(tensors):
            if type(t) in _PLAIN and (size := t.nbytes) and (start := t.data_ptr()):  # not empty, and not on meta
                if not t.is_contiguous():
                    size = _reach(t, f"{name}[{i}]" if names is None else f"parameter {names[i]!r}")
                spans.append((start, start + size, name, i))
    spans.sort()
    for place, ((_, end, name, i), (start, *_)) in enumerate(pairwise(spans), 1):
        if start >= end:
            continue
        for start, _, other, j in spans[place:]:
            if start >= end:
                break
            if _share_memory(lists[name][i], lists[other][j]):
                pair = (f"{name}[{i}]", f"{other}[{j}]") if names is None else (repr(names[i]), repr(names[j]))
                raise ValueError(
                    f"{pair[0]} and {pair[1]} share memory: a tied tensor must be given once, with one gradient"
                )


def _reach(tensor: Tensor, name: str) -> int:
    """Bytes from a tensor's first entry to the end of its last."""
    extents = [(size - 1, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    if any(stride == 0 for _, stride in extents):
        raise ValueError(f"{name} must have memory of its own for every entry, got an expanded tensor")
    return (1 + sum(steps * stride for steps, stride in extents)) * tensor.element_size()


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether a byte belongs to both: columns of one matrix lie between each other without.

    A byte of a tensor is its address plus steps along its strides. Those of `b` are counted from its last byte, so
    that all steps go one way: both meet where steps of either add up to the way from there to the start of `a`.
    """
    most: Counter[int] = Counter()  # steps of each stride, in bytes
    for tensor in (a, b):
        most[1] += tensor.element_size() - 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            most[stride * tensor.element_size()] += size - 1
    last = b.data_ptr() + _reach(b, "b") - 1
    return _is_sum(last - a.data_ptr(), sorted(most.items(), reverse=True))


def _is_sum(total: int, most: list[tuple[int, int]]) -> bool:
    """Whether `total` is a sum of strides, each taken up to so many times; the longest strides come first."""
    if not most:
        return total == 0
    (stride, times), *shorter = most
    rest = sum(length * n for length, n in shorter)
    fewest = max(0, -((rest - total) // stride))
    return any(_is_sum(total - n * stride, shorter) for n in range(fewest, min(times, total // stride) + 1))


def given_norms(name: str, norms: object, scope: int, params: list[Tensor]) -> Tensor:
    """Norms that a caller knows already, as the operators take them: (groups,)."""
    if scope == reference.AWP:
        raise ValueError(f"{name} cannot be given with scope 'awp', which needs those of the weights as well")
    if not isinstance(norms, Tensor) or norms.dtype != torch.float64:
        got = norms.dtype if isinstance(norms, Tensor) else type(norms).__name__
        raise TypeError(f"{name} must be a float64 tensor, got {got}")
    shape = () if scope == reference.GLOBAL else (len(params),)
    if norms.shape != shape:
        raise ValueError(f"{name} must have the shape {shape} of what grad_norm returns, got {tuple(norms.shape)}")
    _validate.same_device(name, norms, params[0], "params")
    return norms.reshape(-1).contiguous()
