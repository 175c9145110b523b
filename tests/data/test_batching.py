from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mmer_fast.data import Batch, SequenceDataset, collate


def test_a_batch_holds_its_samples_padded_to_its_longest(make_small):
    split = make_small().splits["train"]
    indices = [4, 0, 2]
    batch = collate(SequenceDataset(split).__getitems__(indices))
    assert batch.index.tolist() == indices
    assert batch.labels.dtype == torch.float32
    assert np.array_equal(batch.labels.numpy(), split.labels[indices])
    for name, stored in split.features.items():
        lengths = split.lengths[name][indices]
        assert batch.lengths[name].tolist() == lengths.tolist()
        assert batch.lengths[name].dtype == torch.int64
        assert batch.features[name].shape == (3, lengths.max(), stored.shape[2])
        assert np.array_equal(batch.features[name].numpy(), stored[indices, : lengths.max()])


def test_a_batch_of_absent_samples_has_one_step(make_small):
    batch = SequenceDataset(make_small().splits["train"])[0]
    assert batch.lengths["text"].tolist() == [0]
    assert batch.features["text"].shape == (1, 1, 5)
    assert not batch.features["text"].any()


def test_joining_single_samples_equals_fetching_them_together(make_small):
    dataset = SequenceDataset(make_small().splits["train"])
    joined, fetched = (
        collate([dataset[i] for i in range(len(dataset))]),
        dataset.__getitems__(range(len(dataset))),
    )
    assert torch.equal(joined.labels, fetched.labels)
    assert torch.equal(joined.index, fetched.index)
    for name in fetched.features:
        assert torch.equal(joined.features[name], fetched.features[name])
        assert torch.equal(joined.lengths[name], fetched.lengths[name])


def test_the_loader_sees_every_sample_once(make_small):
    dataset = SequenceDataset(make_small().splits["train"])
    loader = DataLoader(dataset, batch_size=3, shuffle=True, collate_fn=collate)
    batches = list(loader)
    assert all(isinstance(batch, Batch) for batch in batches)
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(len(dataset)))


def test_batches_do_not_alias_the_stored_arrays(make_small):
    split = make_small().splits["train"]
    before = split.features["text"].copy()
    batch = SequenceDataset(split).__getitems__([1, 2])
    batch.features["text"].fill_(9)
    batch.lengths["text"].fill_(9)
    assert np.array_equal(split.features["text"], before)
    assert split.lengths["text"].max() <= 6


def test_to_moves_every_tensor(make_small):
    batch = SequenceDataset(make_small().splits["train"]).__getitems__([1, 2]).to("meta")
    tensors = [batch.labels, batch.index, *batch.features.values(), *batch.lengths.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert len(batch) == 2


def test_pin_memory_keeps_values(make_small):
    if not torch.cuda.is_available():
        pytest.skip("page-locked memory needs a CUDA device")
    batch = SequenceDataset(make_small().splits["train"]).__getitems__([1, 2])
    pinned = batch.pin_memory()
    assert pinned.labels.is_pinned()
    assert torch.equal(pinned.features["text"], batch.features["text"])


def test_bad_indices_and_empty_batches_are_refused(make_small):
    dataset = SequenceDataset(make_small().splits["train"])
    assert dataset[-1].index.item() == len(dataset) - 1
    with pytest.raises(IndexError, match=r"expected a value in \[-7, 7\); got 7"):
        dataset[7]
    with pytest.raises(ValueError, match="expected at least one batch"):
        collate([])


def test_a_batch_on_a_device_knows_its_lengths_on_the_cpu(make_small):
    batch = SequenceDataset(make_small().splits["train"]).__getitems__([4, 0, 2])
    assert all(batch.host_lengths[name] is lengths for name, lengths in batch.lengths.items())
    moved = batch.to("meta")  # where nothing can be read
    assert moved.lengths["text"].is_meta
    for name, lengths in batch.lengths.items():
        assert moved.host_lengths[name] is lengths
        parts = [part.host_lengths[name] for part in moved.split([1, 2])]
        assert torch.equal(torch.cat(parts), lengths)
        assert torch.equal(moved.to("meta").host_lengths[name], lengths)


def test_lengths_that_were_replaced_are_read_where_they_are(make_small):
    batch = SequenceDataset(make_small().splits["train"]).__getitems__([4, 0, 2]).to("cpu")
    batch.lengths["text"] = torch.tensor([1, 2, 3])
    assert batch.host_lengths["text"].tolist() == [1, 2, 3]
    moved = batch.to("meta")
    moved.lengths["text"] = torch.empty(3, dtype=torch.int64, device="meta")
    with pytest.raises(NotImplementedError):
        moved.host_lengths  # noqa: B018
