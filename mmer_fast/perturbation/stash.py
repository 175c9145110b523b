"""What is kept of each parameter: memory for its bits, allocated once, and whether it is perturbed right now.

The records live as long as the parameters do. So a loop that perturbs the same weights again finds their stash, and a
second perturbation of weights that are perturbed already is noticed, wherever it comes from.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmer_fast.perturbation.selection import Named, Target, choose
from mmer_fast.perturbation.sharded import local


def kind(values: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return values.shape, values.dtype, values.device


class Record:
    """Of one parameter: `stash` in the layout of its (local) values, and whether it is `perturbed`."""

    __slots__ = ("_kind", "_owner", "perturbed", "stash")

    def __init__(self, owner: weakref.ref[Tensor]) -> None:
        self._owner = owner
        self._kind: tuple[torch.Size, torch.dtype, torch.device] | None = None
        self.stash: Tensor | None = None
        self.perturbed = False

    def stash_for(self, values: Tensor) -> Tensor:
        """The stash, allocated anew where the values are of another kind than before (module.to(...))."""
        stash, wanted = self.stash, kind(values)
        if stash is None or wanted != self._kind:
            stash = self.stash = torch.empty_like(values, requires_grad=False)
            self._kind = wanted
        return stash


# By id, which is fast; the weak reference takes the record along when the parameter goes.
_RECORDS: dict[int, Record] = {}


def records_of(parameters: Sequence[Tensor]) -> list[Record]:
    """The records of parameters, made where there is none yet."""
    return [_RECORDS.get(id(p)) or _new_record(p) for p in parameters]


def _new_record(parameter: Tensor) -> Record:
    key = id(parameter)

    def forget(_: Any) -> None:
        _RECORDS.pop(key, None)

    # Not of a DTensor itself: `module.to` swaps it with another, which torch refuses where there is a weak reference.
    record = _RECORDS[key] = Record(weakref.ref(local(parameter), forget))
    return record


def is_perturbed(parameter: Tensor) -> bool:
    record = _RECORDS.get(id(parameter))
    return record is not None and record.perturbed


def clean_values(parameter: Tensor) -> Tensor | None:
    """A copy of the unperturbed (local) values of a parameter that is perturbed right now; None of others."""
    kept = _RECORDS[id(parameter)].stash if is_perturbed(parameter) else None
    return None if kept is None else kept.clone()


def refuse_perturbed(named: Named, records: Sequence[Record]) -> None:
    """
    Raises:
        RuntimeError: naming the first parameter that is perturbed already.
    """
    for (name, _), record in zip(named, records, strict=True):
        if record.perturbed:
            raise RuntimeError(
                f"parameter {name!r} is perturbed already: perturbations do not nest. Leave the `perturbed` block, or "
                "call restore_() of the handle that perturb_ returned, first"
            )


def release_stash(module_or_params: Target) -> None:
    """Frees the memory that perturbations of these parameters keep: as much as the parameters themselves have.

    The next perturbation allocates it again. Until then nothing refers to the parameters, not weakly either, which
    ``torch.utils.swap_tensors`` asks for (``torch.__future__.set_swap_module_params_on_conversion``).

    Args:
        module_or_params: a module, or tensors.

    Raises:
        RuntimeError: a parameter is perturbed right now.
    """
    named = choose(module_or_params, None)
    refuse_perturbed(named, records_of([parameter for _, parameter in named]))
    for _, parameter in named:
        _RECORDS.pop(id(parameter), None)
