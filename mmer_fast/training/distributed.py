"""Several processes that train one model: who they are, what each takes of a batch, and how they end together.

    torchrun --nproc-per-node 4 -m mmer_fast train ...            every process holds the whole model
    torchrun --nproc-per-node 4 -m mmer_fast train --fsdp ...     its parameters are sharded (FSDP2)

A training over N processes is the training of one process with the same configuration: `TrainConfig.batch_size` is the
size of the *global* batch, of which every rank takes every N-th sample. The losses are means over samples, so a rank
weights its own by `World.weight`; the mean of the gradients over the ranks is then the gradient of the global batch,
whatever the ranks' shares. A rank that gets no sample computes one with weight 0, so that it takes part in everything
that the others do. Initialisation and data order are those of one process. What is drawn while training (dropout,
augmentations, random masks and directions) each rank draws for its part: rank 0 from the generator of one process,
every other from one seeded with its own number (`World.seed_draws`). Augmentations take their moments from the part.

`joined` makes an exception on one rank the end of all: the first to fail says what happened, whoever loses contact to
it ends with a `ProcessFailed`. A process that is killed is noticed by torchrun, which ends the others, or by the closed
connection, or, where a rank only hangs, by `timeout`. How models are held is in `mmer_fast.training.data_parallel`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmer_fast.data import Batch, Split

TIMEOUT = 600.0
"""Seconds that a rank waits for the others."""
SEED_STRIDE = 1_000_003
CPU = torch.device("cpu")


class ProcessFailed(RuntimeError):
    """Another process of this training failed or is gone.

    Attributes:
        reported: whether another process has said what happened.
    """

    def __init__(self, message: str, *, reported: bool) -> None:
        super().__init__(message)
        self.reported = reported


class WorldError(ValueError):
    """Processes cannot train together as they were started; the message says why and what to do."""


@dataclass(frozen=True)
class World:
    """The processes that train together; by default one alone, for which nothing is exchanged.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        group: their process group; None: this process is alone.
        device: of this process, on which its tensors are exchanged.
        fsdp: parameters are sharded over the processes.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    device: torch.device = CPU
    fsdp: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def part(self, indices_b: Tensor) -> Tensor:
        """The samples of a global batch that this rank computes, at least one."""
        own = indices_b[self.rank :: self.size]
        return own if len(own) else indices_b[:1]

    def weight(self, indices_b: Tensor) -> float:
        """What a rank's mean loss over its `part` is multiplied by; its mean over ranks is 1."""
        return len(indices_b[self.rank :: self.size]) * self.size / len(indices_b)

    def turns(self, batches: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        """Batches in turns, whole: as many as every other rank computes, and how many of them count."""
        own = list(batches[self.rank :: self.size])
        return own + list(batches[-1:]) * (-(-len(batches) // self.size) - len(own)), len(own)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, on the device of `tensor`, which may be overwritten."""
        if self.group is None:
            return tensor
        total = tensor.to(self.device)
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """`tensor`, of the same shape and dtype everywhere, of each rank."""
        if self.group is None:
            return [tensor]
        own = tensor.to(self.device)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self.group)
        return [part.to(tensor.device) for part in parts]

    def gather_objects(self, value: Any) -> list[Any]:
        """`value`, anything that can be pickled, of each rank."""
        values = [value] * self.size
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def seed_draws(self, seed: int) -> None:
        """Seed torch's generators with `seed` + 1000003 · rank on the ranks after the first."""
        if self.rank:
            torch.manual_seed(seed + SEED_STRIDE * self.rank)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Check that the ranks were told the same. Every rank has to call it: none goes on before all have come.

        Raises:
            WorldError: naming each fact that differs, with the values of two ranks; on every rank.
        """
        told = self.gather_objects(dict(facts))
        for rank, other in enumerate(told):
            differing = [key for key in sorted({*told[0], *other}) if told[0].get(key) != other.get(key)]
            if differing:
                listed = "; ".join(
                    f"{k}: rank 0 has {told[0].get(k)!r}, rank {rank} {other.get(k)!r}" for k in differing
                )
                raise WorldError(f"the processes of a training must have the same configuration and data ({listed})")

    def wait(self) -> None:
        """Return when all ranks have come here."""
        if self.group is not None:
            dist.barrier(group=self.group)


ALONE = World()


def whole_batch(world: World, indices_b: Tensor, losses: Tensor, logits_bk: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (3,) and logits (B, K) of a global batch from those of each rank's part, by one exchange.

    The logits come in the order of the batch.
    """
    if world.group is None:
        return losses, logits_bk
    own = len(indices_b[world.rank :: world.size])
    whole_bk = logits_bk.new_zeros(len(indices_b), logits_bk.shape[1])
    if own:
        whole_bk[world.rank :: world.size] = logits_bk
    weighted = losses.to(logits_bk.dtype) * (own / len(indices_b))
    flat = world.sum(torch.cat([weighted, whole_bk.flatten()]))
    return flat[: len(losses)].to(losses.dtype), flat[len(losses) :].view_as(whole_bk)


def padded_as_whole(batch: Batch, split: Split, indices_b: Tensor) -> Batch:
    """A rank's part of a batch, padded to the longest sample of all of it: where padding counts, that matters."""
    steps = {name: max(1, int(split.lengths[name][indices_b.numpy()].max())) for name in batch.features}
    features = {
        name: torch.nn.functional.pad(x_btf, (0, 0, 0, steps[name] - x_btf.shape[1]))
        for name, x_btf in batch.features.items()
    }
    return replace(batch, features=features)


def launched() -> bool:
    """Whether torchrun, or what sets its environment variables, started this process as one of several."""
    return dist.is_available() and all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


@contextmanager
def joined(
    choose_device: Callable[[], torch.device], *, fsdp: bool = False, timeout: float = TIMEOUT
) -> Iterator[World]:
    """The world of this process, joined on entering and left together with the others at the end.

    Started by torchrun, the processes talk through NCCL on CUDA, where each takes the device of its LOCAL_RANK, else
    through gloo. A process group that exists already is used as it is, and outlives the block. Started otherwise, the
    process is alone.

    Args:
        choose_device: gives the device, on CUDA without a number; called inside, so that an error is one of the block.
        fsdp: shard the parameters.
        timeout: seconds, positive, that a rank waits for the others anywhere inside.

    Raises:
        WorldError: `fsdp` where the process is alone, a CUDA device with a number, or none for this process.
        ProcessFailed: another process failed first, is gone, or never came.
    """
    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, _own_device(choose_device()), fsdp)
        return
    if not launched():
        if fsdp:
            raise WorldError("fsdp shards a model over several processes; start them with torchrun --nproc-per-node N")
        yield World(device=choose_device())
        return
    limit = timedelta(seconds=timeout)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    except (dist.DistError, ValueError) as error:  # nobody came in time, or an environment variable is missing
        cause = str(error).partition("\n")[0]
        what = f"the processes of this training did not come together within {timeout:g} s (--timeout)"
        raise ProcessFailed(f"{what}: {cause}", reported=False) from error
    try:
        device = _own_device(choose_device())
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore("mmer_fast", store),
            rank=rank,
            world_size=size,
            timeout=limit,
            device_id=device if cuda else None,
        )
        world = World(rank, size, dist.group.WORLD, device, fsdp)
        yield world
        world.wait()
    except Exception as error:
        if not _first_failure(store):
            raise ProcessFailed("another process of this training failed first", reported=True) from error
        if _lost_contact(error):
            happened, cause = "lost contact with another process of this training", str(error).partition("\n")[0]
            if re.search(r"timed? ?out", cause, re.IGNORECASE):
                happened = f"waited {timeout:g} s (--timeout) for another process of this training in vain"
            raise ProcessFailed(
                f"{happened} ({cause}); what was saved is whole, and the training can be resumed", reported=False
            ) from error
        raise
    dist.destroy_process_group()


def _own_device(device: torch.device) -> torch.device:
    """The CUDA device of this process's LOCAL_RANK; other devices as they are."""
    if device.type != "cuda":
        return device
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if device.index is not None:
        raise WorldError(f"device must be cuda without a number where processes take one each, got {device}")
    if index >= torch.cuda.device_count():
        raise WorldError(f"process {index} of this machine has no CUDA device: there are {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def _first_failure(store: dist.Store) -> bool:
    """Whether no other process has failed before; counts this one."""
    try:
        return store.add("mmer_fast/failures", 1) == 1
    except RuntimeError:  # the process that holds the store has ended
        return True


def _lost_contact(error: Exception) -> bool:
    """Whether this is how torch says that another process does not answer."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
