"""The learning rate by step, and the order of the samples."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from small_training import TRAIN, small_data

from mmer_fast.training import preset
from mmer_fast.training.accumulation import micro_batches_of
from mmer_fast.training.order import batches, epoch_batches, sorted_batches
from mmer_fast.training.schedule import learning_rate


def test_the_paper_warms_up_for_ten_iterations_and_follows_a_cosine() -> None:
    _, config = preset("paper")
    total = config.epochs * 7
    rates = [learning_rate(config, step, 7) for step in range(total)]
    assert rates[:10] == pytest.approx([5e-5 * (0.1 + 0.9 * step / 10) for step in range(10)])
    cosine = [5e-5 * (1 + math.cos(math.pi * (step - 10) / (total - 10))) / 2 for step in range(10, total)]
    assert rates[10:] == pytest.approx(cosine)


def test_without_a_warm_up_the_cosine_begins_at_once() -> None:
    config = dataclasses.replace(TRAIN, warmup=0, epochs=2, learning_rate=1.0)
    assert [learning_rate(config, step, 2) for step in range(4)] == pytest.approx(
        [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]
    )


def test_the_authors_never_leave_the_warm_up() -> None:
    _, config = preset("authors")
    by_epoch = [learning_rate(config, 13 * epoch + 5, 13) for epoch in range(10)]
    # timm's schedule from 5e-6 to 5e-5 over ten epochs, advanced by the number of the epoch before
    assert by_epoch == pytest.approx([5e-6, *(5e-6 + 4.5e-6 * epoch for epoch in range(9))])


@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize("batch_size", [7, 8, 100, 10**20])
def test_every_sample_comes_once_an_epoch(bucket: bool, batch_size: int) -> None:
    split = small_data().splits["train"]
    config = dataclasses.replace(TRAIN, batch_size=batch_size, bucket_by_length=bucket)
    chunks = epoch_batches(split, config, 0)
    assert len(chunks) == math.ceil(len(split) / batch_size)
    assert max(map(len, chunks)) <= batch_size
    assert sorted(torch.cat(chunks).tolist()) == list(range(len(split)))


def test_any_seed_that_a_configuration_takes_has_an_order() -> None:
    split = small_data().splits["train"]
    config = dataclasses.replace(TRAIN, seed=2**63 - 1)
    assert torch.cat(epoch_batches(split, config, 1)).sort().values.tolist() == list(range(len(split)))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    split = small_data().splits["train"]
    state = torch.get_rng_state()

    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat(epoch_batches(split, dataclasses.replace(TRAIN, seed=seed), epoch)).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("batch_size", [100, 10**20])
def test_a_batch_larger_than_the_data_is_all_of_it(batch_size: int) -> None:
    split = small_data().splits["train"]
    assert [len(chunk) for chunk in sorted_batches(split, batch_size)] == [len(split)]
    (whole,) = epoch_batches(split, dataclasses.replace(TRAIN, batch_size=batch_size), 0)
    assert [len(part) for part in micro_batches_of(whole, dataclasses.replace(TRAIN, batch_size=batch_size))] == [
        len(split)
    ]


def test_buckets_leave_less_padding() -> None:
    split = small_data(n_train=128, max_length=40).splits["train"]
    padding = {}
    for bucket in (False, True):
        config = dataclasses.replace(TRAIN, batch_size=16, bucket_by_length=bucket)
        chunks = [torch.from_numpy(split.lengths["audio"])[chunk] for chunk in epoch_batches(split, config, 0)]
        padding[bucket] = sum(int((lengths.max() - lengths).sum()) for lengths in chunks)
    assert padding[True] < 0.5 * padding[False]


def test_batches_of_a_pool_come_in_no_order_of_length() -> None:
    split = small_data(n_train=128, max_length=40).splits["train"]
    chunks = epoch_batches(split, dataclasses.replace(TRAIN, batch_size=16, bucket_by_length=True), 0)
    longest = [int((split.lengths["audio"] + split.lengths["video"])[chunk].max()) for chunk in chunks]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_whole_groups_fill_a_batch_to_its_size() -> None:
    split = small_data(n_train=10).splits["train"]
    split.extras["dialogue"] = np.array([4, 4, 0, 1, 1, 4, 2, 2, 2, 3])
    chunks = sorted_batches(split, 4, "dialogue")
    assert [chunk.tolist() for chunk in chunks] == [[2, 9, 3, 4], [6, 7, 8], [0, 1, 5]]
    config = dataclasses.replace(TRAIN, batch_size=2)  # groups
    assert [part.tolist() for part in micro_batches_of(chunks[0], config, "dialogue")] == [[2, 9, 3, 4]]


def test_batches_carry_the_samples_asked_for() -> None:
    split = small_data().splits["valid"]
    chunks = sorted_batches(split, 5)
    for chunk, batch in zip(chunks, batches(split, chunks, torch.device("cpu")), strict=True):
        assert torch.equal(batch.index, chunk)
        assert torch.equal(batch.labels, torch.from_numpy(split.labels)[chunk].float())
