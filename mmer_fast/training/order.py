"""Which samples form which batch, and in which order."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
import torch
from torch import Tensor

from mmer_fast.data import Batch, SequenceDataset, Split
from mmer_fast.training.loop_config import LoopConfig

POOL_BATCHES = 8
"""Batches whose samples are sorted by length together: many save padding, few keep the batches mixed."""


def epoch_batches(split: Split, config: LoopConfig, epoch: int, group: str | None = None) -> list[Tensor]:
    """The batches of a training epoch, as sample indices; a function of the split, seed and epoch alone.

    A random permutation is cut into batches. With `bucket_by_length` it is first cut into pools of
    `POOL_BATCHES` batches, each sorted by length, and the resulting batches are shuffled.

    Args:
        split: a validated split.
        config: seed, batch size and bucketing.
        epoch: from 0.
        group: an extra whose values stay together: it is then groups that are permuted, sorted by their sizes and
            counted by the batch size; a group's samples come in the order of the split.
    """
    if group is not None:
        members = _members(split, group)
        sizes = torch.tensor([len(indices) for indices in members])
        return [torch.cat([members[i] for i in chosen.tolist()]) for chosen in _shuffled(sizes, config, epoch)]
    return _shuffled(_total_lengths(split), config, epoch)


def steps_per_epoch(split: Split, config: LoopConfig, group: str | None = None) -> int:
    """How many batches `epoch_batches` gives."""
    count = len(split) if group is None else len(np.unique(np.asarray(split.extras[group])))
    return -(-count // config.batch_size)


def _shuffled(lengths: Tensor, config: LoopConfig, epoch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + epoch) % 2**64)
    order = torch.randperm(len(lengths), generator=generator)
    if not config.bucket_by_length:
        return cut(order, config.batch_size)
    pools = cut(order, POOL_BATCHES * config.batch_size)
    sorted_pools = [pool[lengths[pool].argsort(stable=True)] for pool in pools]
    pooled = [batch for pool in sorted_pools for batch in cut(pool, config.batch_size)]
    return [pooled[i] for i in torch.randperm(len(pooled), generator=generator).tolist()]


def sorted_batches(split: Split, batch_size: int, group: str | None = None) -> list[Tensor]:
    """All samples in batches of similar length, as sample indices, for passes whose order does not matter.

    With a `group` (as for `epoch_batches`) in batches of whole groups, of `batch_size` samples or one group at most.
    """
    if group is not None:
        return _whole_groups(_members(split, group), batch_size)
    return cut(_total_lengths(split).argsort(stable=True), batch_size)


def cut(indices: Tensor, size: int) -> list[Tensor]:
    """Consecutive pieces of that size, the last perhaps smaller; of a size beyond what there is, however large, one."""
    return list(indices.split(min(size, max(len(indices), 1))))


def _members(split: Split, group: str) -> list[Tensor]:
    """The sample indices of every group, groups in the order of their values."""
    _, group_n = np.unique(np.asarray(split.extras[group]), return_inverse=True)
    order = torch.from_numpy(np.argsort(group_n, kind="stable"))
    return list(order.split(np.bincount(group_n).tolist()))


def _whole_groups(members: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    found: list[Tensor] = []
    pending: list[Tensor] = []
    for indices in sorted(members, key=len):
        if pending and sum(map(len, pending)) + len(indices) > batch_size:
            found.append(torch.cat(pending))
            pending = []
        pending.append(indices)
    return [*found, torch.cat(pending)] if pending else found


def batches(
    split: Split, indices: Sequence[Tensor], device: torch.device, extras: Sequence[str] = ()
) -> Generator[Batch]:
    """The batches of a split with these sample indices and extras, on `device`."""
    dataset = SequenceDataset(split, extras)
    for chunk in indices:
        batch = dataset.__getitems__(chunk.tolist())
        yield batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)


def _total_lengths(split: Split) -> Tensor:
    return torch.from_numpy(np.sum(list(split.lengths.values()), axis=0))
