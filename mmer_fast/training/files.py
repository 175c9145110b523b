"""The files of a training in its directory: the state, the one before it, the best model, the state of a failure.

Each is replaced as a whole (`mmer_fast.training.checkpoint`). Where one cannot be written, training ends with what was
saved before, and the error says whether that is something to go on from.

The state before the last one is kept, for when the last one is damaged. Only a file that was read or written whole
takes its place: a damaged one never does.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from mmer_fast._files import WriteError
from mmer_fast.training.checkpoint import SavedState, read_last_state, write_tensors
from mmer_fast.training.distributed import ALONE, World
from mmer_fast.training.errors import TrainingError
from mmer_fast.training.memory import Shortage, unless_short
from mmer_fast.training.state import TrainingState

STATE_FILE = "state.safetensors"
PREVIOUS_FILE = "state.previous.safetensors"
"""The state before the one in `STATE_FILE`, for when that is damaged."""
BEST_FILE = "model.safetensors"
FAILED_FILE = "failed.safetensors"
"""The state at a loss or weight that was not finite, or where memory ran out: as in `STATE_FILE`, and the header also
has the positions of the samples of the step in the training split under "batch".
"""


class TrainingFiles:
    """What a training writes and goes on from.

    Args:
        directory: existing.
        world: the processes that train together, each with such an object. Whatever reads or writes, every rank has to
            call: all of them read, rank 0 writes.
    """

    def __init__(self, directory: Path, world: World = ALONE) -> None:
        self.directory, self.world = directory, world
        self.state_is_whole = False
        """Whether `STATE_FILE` is known to be whole: written or read by this object."""

    def read_state(self) -> SavedState | None:
        """The last state, or where it is damaged or missing the one before it; None where there is neither.

        Raises:
            CheckpointError: neither can be read.
            WorldError: some processes could read the last state, others not.
        """
        saved = read_last_state(self.directory / STATE_FILE, self.directory / PREVIOUS_FILE)
        self.world.agree({"saved state": saved and saved.path.name})
        self.state_is_whole = saved is not None and not saved.unusable
        return saved

    def write_state(self, state: TrainingState) -> None:
        """Write what `read_state` reads.

        Raises:
            TrainingError: it cannot be written; the state that was saved before is kept.
        """
        previous = self.directory / PREVIOUS_FILE if self.state_is_whole else None
        self._write(STATE_FILE, state.tensors(), asdict(state.progress), previous)
        self.state_is_whole = True

    def write_best(self, state: TrainingState, header: dict[str, Any]) -> None:
        """Write the weights as those of the best model.

        Raises:
            TrainingError: they cannot be written; those that were saved before are kept.
        """
        self._write(BEST_FILE, state.weights(), header)

    def write_failed(self, state: TrainingState, indices_b: Tensor) -> str:
        """Write the state, and which samples the step had, for a post-mortem; in words where it is, or why it is
        nowhere.
        """
        path, tensors = self.directory / FAILED_FILE, state.tensors()
        try:
            if self.world.first:
                write_tensors(path, tensors, {**asdict(state.progress), "batch": indices_b.tolist()})
        except WriteError as error:
            return str(error)
        return f"the state is in {path}"

    def saved_before(self, advice: str) -> str:
        """Whether there is a state to go on from, in words, and if so the advice."""
        saved = any((self.directory / state).exists() for state in (STATE_FILE, PREVIOUS_FILE))
        return f"the state saved before is whole: {advice}" if saved else "no state was saved before"

    def _write(
        self, name: str, tensors: dict[str, Tensor], header: dict[str, Any], previous: Path | None = None
    ) -> None:
        if not self.world.first:
            return
        path = self.directory / name
        try:
            unless_short(lambda: write_tensors(path, tensors, header, keep_previous_as=previous))
        except WriteError as error:
            raise TrainingError(f"{error}; {self.saved_before('go on by --resume')}") from None
        except Shortage as short:
            what = f"memory ran out while {path} was written: {short}"
            raise TrainingError(f"{what}; {self.saved_before('--resume goes on where more is free')}") from None
