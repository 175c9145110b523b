"""Which conditions there are, and what a sample is under one."""

from __future__ import annotations

import pytest
import torch
from small_mmin import small_data

from mmer_fast.data import DataError
from mmer_fast.systems.mmin import condition_masks, missing_conditions, restricted, unified


def test_three_modalities_have_the_six_conditions_of_the_talk() -> None:
    assert missing_conditions("avt") == [("a",), ("v",), ("t",), ("a", "v"), ("a", "t"), ("v", "t")]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_every_proper_part_is_a_condition_once(count: int) -> None:
    conditions = missing_conditions([f"m{i}" for i in range(count)])
    assert len(conditions) == len(set(conditions)) == 2**count - 2
    assert all(0 < len(available) < count for available in conditions)


def test_masks_have_a_row_a_condition() -> None:
    assert condition_masks("avt", ["a", "tv"]).tolist() == [[True, False, False], [False, True, True]]
    assert condition_masks("a", missing_conditions("a")).shape == (0, 1)


def test_unified_samples_are_the_triplets_of_the_talk() -> None:
    embeddings = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[7.0, 8.0], [9.0, 10.0], [11.0, 12.0]]])
    absent = torch.tensor([[-1.0, -1.0], [-2.0, -2.0], [-3.0, -3.0]])
    available = torch.tensor([[True, False, False], [True, False, True]]).expand(2, 2, 3)
    rows = unified(embeddings, available, absent)
    assert rows.tolist() == [
        [1, 2, -2, -2, -3, -3],
        [1, 2, -2, -2, 5, 6],
        [7, 8, -2, -2, -3, -3],
        [7, 8, -2, -2, 11, 12],
    ]
    other_half = unified(embeddings, ~available, absent)
    assert other_half[1].tolist() == [-1, -1, 3, 4, -3, -3]


def test_restricted_data_lacks_the_others_and_leaves_the_original_alone() -> None:
    data = small_data()
    split = data.splits["test"]
    before = split.lengths["text"].copy()
    data.splits["test"] = restricted(split, ["audio"])
    data.check()
    assert not data.splits["test"].lengths["text"].any()
    assert (data.splits["test"].lengths["audio"] == split.lengths["audio"]).all()
    assert (split.lengths["text"] == before).all()


def test_an_unknown_modality_is_an_error() -> None:
    with pytest.raises(DataError, match="expected some of text, video, audio; got smell"):
        restricted(small_data().splits["test"], ["audio", "smell"])
