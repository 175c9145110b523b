"""The best model so far: which epoch it is of, by what its file says, and whether an epoch is better.

The model is written before the state that speaks of it, so that no state speaks of a model that is not on disk. Where
the process dies between the two, the file holds the model of an epoch that the state, from which training goes on, has
not done. The model that the state speaks of is then lost, but the one in the file was better. It is what later epochs
have to surpass, and so is the same epoch, trained again: on the same machine it gives the same bits, elsewhere it may
come out worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmer_fast.training.checkpoint import CheckpointError, read_tensors
from mmer_fast.training.origin import ORIGIN


@dataclass(frozen=True)
class Best:
    """A best model on disk.

    Attributes:
        epoch: after which it was written, from 1.
        value: of the validation metric that selects, there.
    """

    epoch: int
    value: float


def read_best(
    path: Path, expected: Mapping[str, Tensor], history: Sequence[Mapping[str, Any]], best: int | None, selection: str
) -> Best | None:
    """The best model in a file; None where there is none that counts. Finds out now, and not when training has ended,
    that it is lost.

    Args:
        path: of the file.
        expected: tensors of the names and shapes that it has to have.
        history: of the state from which training goes on, one record an epoch.
        best: which epoch (from 1) the best model is of, as this state says.
        selection: metric that selects.

    Raises:
        CheckpointError: `best` is an epoch, and the file is missing, damaged or of another model; or it says that it is
            of an epoch other than `best` and the one after `history`.
    """
    if best is None:  # what the end of the first epoch replaces need not be whole
        try:
            header = _read(path, expected, "")
        except CheckpointError:
            return None
    else:
        what = f"the best model so far, of epoch {best}"
        if not path.exists():
            raise CheckpointError(f"{path} is missing: {what}; restore a copy of it, or start a new run")
        advice = f"it is {what}: restore a copy of it, or start a new run in another directory"
        header = _read(path, expected, advice)
    entry = header.get(ORIGIN)
    if entry is not None and entry["epoch"] in (best, len(history) + 1):
        return Best(entry["epoch"], entry["value"])
    if best is None:
        return None
    if entry is None:
        return Best(best, history[best - 1]["valid"][selection])
    raise CheckpointError(
        f"{path} is of epoch {entry['epoch']}, but the state expects {what}: restore a copy of that, or start a new "
        "run in another directory"
    )


def _read(path: Path, expected: Mapping[str, Tensor], advice: str) -> dict[str, Any]:
    """The header of a file of tensors with these names and shapes."""
    tensors, header = read_tensors(path, advice=advice)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    differing = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
    if differing:
        raise CheckpointError(f"{path} does not hold this model: {differing[0]} differs; {advice}")
    return dict(header)


def only_pretrained(history: Sequence[Mapping[str, Any]]) -> str | None:
    """That no epoch of a history trained the whole network, as a sentence; None where one did."""
    if not history or not all(record.get("pretraining", False) for record in history):
        return None
    return f"All {len(history)} epochs were pretraining: the whole network was never trained, which takes more epochs."


def is_better(history: Sequence[Mapping[str, Any]], best: Best | None, selection: str) -> bool:
    """Whether the model of the last epoch is to take the place of the best one.

    Any epoch with the whole network is better than one of pretraining. A model of the same epoch, of which training
    has gone on in other ways than from this one, stays where it is better.

    Args:
        history: one record an epoch.
        best: on disk, of one of these epochs.
        selection: metric that selects.
    """
    if best is None:
        return True
    record = history[-1]
    if best.epoch == record["epoch"]:
        return bool(record["valid"][selection] >= best.value)
    whole, was_whole = (not each.get("pretraining", False) for each in (record, history[best.epoch - 1]))
    return (whole, record["valid"][selection]) > (was_whole, best.value)
