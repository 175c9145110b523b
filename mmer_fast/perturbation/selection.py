"""Which parameters a call is about, and their gradients."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmer_fast.ops import _validate

Target = nn.Module | Tensor | Iterable[Any]
Select = str | type[nn.Module] | Callable[[str, Tensor], bool] | Sequence[Any]
Grads = Sequence[Tensor | None] | Mapping[str, Tensor]
Named = list[tuple[str, Tensor]]


def choose(target: Target, select: Select | None) -> Named:
    """(name, parameter) of what `target` and `select` name, each parameter once, in the order of `target`.

    Args:
        target: a module, a tensor, or an iterable of tensors or of (name, tensor).
        select: for a module: a pattern of names ("encoder.*.weight", as fnmatch has them), a type of modules
            (everything inside of them), a function (name, parameter) -> bool, or a sequence of these, any of which may
            fit. None: all.

    Raises:
        TypeError: something of another type.
        ValueError: a part of `select` that fits no parameter, an empty one, or `select` without a module.
    """
    if not isinstance(target, nn.Module):
        if select is not None:
            raise ValueError("select needs a module to select from; choose among the parameters yourself")
        return _listed(target)
    named: Named = list(target.named_parameters())
    if select is None:
        return named
    parts = list(select) if isinstance(select, Sequence) and not isinstance(select, str) else [select]
    if not parts:
        raise ValueError("select must hold at least one pattern, type or function, got none; None selects everything")
    chosen: set[int] = set()
    for part in parts:
        found = _selected(target, named, part)
        if not found:
            names = [name for name, _ in named]
            shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
            raise ValueError(f"select={_shown(part)} fits no parameter; there are {shown or 'none'}")
        chosen |= found
    return [(name, parameter) for name, parameter in named if id(parameter) in chosen]


def gradients(named: Named, grads: Grads | None) -> list[Tensor | None]:
    """The gradient of each parameter: from `grads`, else from `.grad` of those that require one; None where absent.

    Raises:
        TypeError, ValueError: one of `grads` that cannot belong to its parameter.
    """
    if grads is None:
        return [parameter.grad if parameter.requires_grad else None for _, parameter in named]
    if isinstance(grads, Mapping):
        if unknown := sorted(set(grads) - {name for name, _ in named}):
            raise ValueError(f"grads must be named as the parameters are, got {', '.join(map(repr, unknown))}")
        found = [grads.get(name) for name, _ in named]
    else:
        if isinstance(grads, (str, Tensor)) or not isinstance(grads, Iterable):
            raise TypeError(f"grads must be a sequence of tensors or a mapping by name, got {type(grads).__name__}")
        found = list(grads)
        if len(found) != len(named):
            raise ValueError(f"grads must hold an entry for each of the {len(named)} parameters, got {len(found)}")
    for (name, parameter), gradient in zip(named, found, strict=True):
        if gradient is not None:
            check_gradient(name, parameter, gradient)
    return found


def _listed(target: Tensor | Iterable[Any]) -> Named:
    if isinstance(target, Tensor):
        return [("0", target)]
    if isinstance(target, (str, Mapping)) or not isinstance(target, Iterable):
        raise TypeError(f"module_or_params must be a module or tensors, got {type(target).__name__}")
    named: dict[int, tuple[str, Tensor]] = {}
    for i, item in enumerate(target):
        if isinstance(item, Tensor):
            named.setdefault(id(item), (str(i), item))
            continue
        name, tensor = item if isinstance(item, tuple) and len(item) == 2 else (i, item)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"module_or_params[{i}] must be a tensor, got {type(tensor).__name__}")
        named.setdefault(id(tensor), (str(name), tensor))
    return list(named.values())


def _selected(module: nn.Module, named: Named, part: object) -> set[int]:
    if isinstance(part, str):
        return {id(parameter) for name, parameter in named if fnmatch.fnmatchcase(name, part)}
    if isinstance(part, type) and issubclass(part, nn.Module):
        return {id(p) for inner in module.modules() if isinstance(inner, part) for p in inner.parameters()}
    if callable(part) and not isinstance(part, type):
        return {id(parameter) for name, parameter in named if part(name, parameter)}
    raise TypeError(f"select must be name patterns, types of modules or functions, got {part!r}")


def _shown(part: object) -> str:
    return part.__name__ if isinstance(part, type) else repr(part)


def check_gradient(name: str, parameter: Tensor, gradient: object) -> None:
    """
    Raises:
        TypeError, ValueError: a gradient that cannot belong to its parameter.
    """
    _validate.floating_tensor(f"parameter {name!r}", parameter)
    if parameter.layout != torch.strided:
        raise TypeError(f"parameter {name!r} must be dense, got {parameter.layout}")
    if not parameter.is_leaf:
        raise ValueError(f"parameter {name!r} must be a leaf, not the result of an operation: it is moved in place")
    _validate.floating_tensor(f"the gradient of {name!r}", gradient)
    assert isinstance(gradient, Tensor)
    if gradient.layout != torch.strided:
        raise TypeError(f"the gradient of {name!r} must be dense, got {gradient.layout}; use sparse=False")
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"the gradient of {name!r} must have the shape {tuple(parameter.shape)}, got {tuple(gradient.shape)}"
        )
    _validate.same_device(f"the gradient of {name!r}", gradient, parameter, "its parameter")
