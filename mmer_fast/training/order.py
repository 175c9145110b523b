"""Which samples form which batch, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mmer_fast.data import Batch, SequenceDataset, Split
from mmer_fast.training.config import TrainConfig

POOL_BATCHES = 8
"""Batches whose samples are sorted by length together: many save padding, few keep the batches mixed."""


def epoch_batches(split: Split, config: TrainConfig, epoch: int) -> list[Tensor]:
    """The batches of a training epoch, as sample indices; a function of the split, seed and epoch alone.

    A random permutation is cut into batches. With `bucket_by_length` it is first cut into pools of
    `POOL_BATCHES` batches, each sorted by length, and the resulting batches are shuffled.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(len(split), generator=generator)
    if not config.bucket_by_length:
        return list(order.split(config.batch_size))
    lengths = _total_lengths(split)
    pools = order.split(POOL_BATCHES * config.batch_size)
    sorted_pools = [pool[lengths[pool].argsort(stable=True)] for pool in pools]
    pooled = [batch for pool in sorted_pools for batch in pool.split(config.batch_size)]
    return [pooled[i] for i in torch.randperm(len(pooled), generator=generator).tolist()]


def sorted_batches(split: Split, batch_size: int) -> list[Tensor]:
    """All samples in batches of similar length, as sample indices, for passes whose order does not matter."""
    return list(_total_lengths(split).argsort(stable=True).split(batch_size))


def batches(split: Split, indices: Sequence[Tensor], device: torch.device) -> Iterator[Batch]:
    """The batches of a split with these sample indices, on `device`."""
    dataset = SequenceDataset(split)
    for chunk in indices:
        yield dataset.__getitems__(chunk.tolist()).to(device)


def _total_lengths(split: Split) -> Tensor:
    return torch.from_numpy(np.sum(list(split.lengths.values()), axis=0))
