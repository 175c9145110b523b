"""The state of a training: all that its next step depends on besides configuration and data.

These are the weights, the optimiser, the random generators, the place in the data order (a permutation seeded by seed
and epoch) and the running sums of the epoch. So training that was killed at any moment and goes on from a saved state
ends with the same bits as training that was not, on the same machine.

On its way to a file and back a state is tensors and JSON, whole also where processes hold shards of it: all of them
have to come together for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmer_fast.models.network import Network
from mmer_fast.training.checkpoint import CheckpointError, SavedState
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


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """State of an optimiser over `model.parameters()` as `<parameter name>/<state key>` → tensor."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`.

    Raises:
        KeyError: a parameter is unknown, or lacks a part of the state that others have.
    """
    state: dict[int, dict[str, Tensor]] = {}
    index = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("/", 1)
        state.setdefault(index[name], {})[key] = tensor
    keys = {key for values in state.values() for key in values}
    for name, i in index.items():
        missing = keys - state[i].keys() if i in state else set()
        if missing:
            raise KeyError(f"{name}/{min(missing)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_states(world: World = ALONE) -> dict[str, Tensor]:
    """States of torch's random generators (the only ones that training draws from), `cpu` and `cuda/<index>`.

    Of several processes, those of every one: of the first `cpu` and `cuda/0`, its device, as if it were alone; of the
    others the same under `ranks/<rank>/`. Each has to call this.
    """
    if world.group is None:
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states |= {f"cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        return states
    own = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        own["cuda/0"] = torch.cuda.get_rng_state(world.device)
    return {_of_rank(rank) + name: state for name, mine in own.items() for rank, state in enumerate(world.gather(mine))}


def restore_random_states(states: Mapping[str, Tensor], world: World = ALONE) -> None:
    """The inverse of `random_states`; generators of ranks or devices without a state are left alone."""
    cpu = _of_rank(world.rank) + "cpu"
    if cpu in states or world.first:
        torch.set_rng_state(states[cpu])
    if world.group is None:
        devices = {f"cuda/{i}": torch.device("cuda", i) for i in range(torch.cuda.device_count())}
    else:
        devices = {_of_rank(world.rank) + "cuda/0": world.device} if world.device.type == "cuda" else {}
    for name, device in devices.items():
        if name in states:
            torch.cuda.set_rng_state(states[name], device)


def _of_rank(rank: int) -> str:
    return f"ranks/{rank}/" if rank else ""


def section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under `prefix/`, without the prefix."""
    return {name.removeprefix(prefix + "/"): t for name, t in tensors.items() if name.startswith(prefix + "/")}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `section`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}
