"""The state of a training: all that its next step depends on beside configuration and data.

These are the weights, the optimiser, the random generators, the place in the data order (a permutation seeded by seed
and epoch) and the running sums of the epoch. So training that was killed at any moment and goes on from a saved state
ends with the same bits as training that was not, on the same machine.

On its way to a file and back a state is tensors and JSON, whole also where processes hold shards of it: all of them
have to come together for that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmer_fast.models.network import Network
from mmer_fast.training.checkpoint import (
    CheckpointError,
    SavedState,
    load_optimizer_tensors,
    optimizer_tensors,
    random_states,
    restore_random_states,
    section,
    with_prefix,
)
from mmer_fast.training.data_parallel import gathered, scattered
from mmer_fast.training.distributed import ALONE, World
from mmer_fast.training.sums import EpochSums


@dataclass
class Progress:
    """Where training is: epochs done, steps done in the epoch under way, and what was seen so far."""

    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    gradient_ratios: list[float] = field(default_factory=list)
    best_epoch: int | None = None

    @property
    def place(self) -> str:
        """What was done last, in words."""
        return f"step {self.step} of epoch {self.epoch + 1}" if self.step else f"epoch {self.epoch}"


@dataclass
class TrainingState:
    """What changes in a training.

    Attributes:
        model: whose weights are trained.
        optimizer: of its parameters.
        sums: of the epoch under way.
        world: the processes that train together, each of which has such a state.
        progress: the place of the next step, and the history.
    """

    model: Network
    optimizer: torch.optim.Optimizer
    sums: EpochSums
    world: World = ALONE
    progress: Progress = field(default_factory=Progress)

    def weights(self) -> dict[str, Tensor]:
        """Those of the model. Every rank has to call it."""
        return gathered(self.model.state_dict())

    def tensors(self) -> dict[str, Tensor]:
        """Everything but `progress`. Every rank has to call it."""
        return {
            **with_prefix("model", self.weights()),
            **with_prefix("optimizer", gathered(optimizer_tensors(self.optimizer, self.model))),
            **with_prefix("random", random_states(self.world)),
            "sums/losses": self.sums.losses,
            "sums/counts": self.sums.counts,
        }

    def restore(self, saved: SavedState) -> None:
        """Become the state whose tensors, and progress as the header, were saved.

        Raises:
            CheckpointError: it is that of another training.
        """
        tensors = saved.tensors
        try:
            self.model.load_state_dict(scattered(section(tensors, "model"), self.model))
            optimizer = scattered(section(tensors, "optimizer"), self.model)
            load_optimizer_tensors(self.optimizer, self.model, optimizer)
            self.sums.losses.copy_(tensors["sums/losses"])
            self.sums.counts.copy_(tensors["sums/counts"])
            self.progress = Progress(**saved.header)
            restore_random_states(section(tensors, "random"), self.world)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{saved.path} is not a state of this training: {error}") from None

    def end_epoch(self) -> None:
        """Go on to the first step of the next epoch."""
        self.progress.epoch, self.progress.step, self.progress.gradient_ratios = self.progress.epoch + 1, 0, []
        self.sums.clear()
