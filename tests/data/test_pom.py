"""The real POM files in both formats; skipped with the reason where they are absent."""

from __future__ import annotations

import numpy as np
import pytest

from mmer_fast.data import FORMATS, SequenceDataset, load
from mmer_fast.data.inspection import summarise


def test_both_formats_hold_the_same_data(pom_dir):
    plain, pickled = load(pom_dir / "pom.npz"), load(pom_dir / "pom_train_valid_test.pt")
    assert plain.modalities == pickled.modalities == {"audio": 43, "video": 41}
    assert len(plain.label_names) == len(pickled.label_names) == 17
    assert {name: len(split) for name, split in plain.splits.items()} == {
        "train": 600,
        "valid": 100,
        "test": 203,
    }
    for name, split in plain.splits.items():
        other = pickled.splits[name]
        assert np.array_equal(split.labels, other.labels)
        for modality in plain.modalities:
            assert np.array_equal(split.lengths[modality], other.lengths[modality])
            assert np.array_equal(split.features[modality], other.features[modality])


def test_front_padding_is_gone_and_no_feature_row_is_lost(pom_dir):
    data = load(pom_dir / "pom.npz")
    with np.load(pom_dir / "pom.npz") as raw:
        for name, split in data.splits.items():
            for modality in data.modalities:
                present = split.lengths[modality] > 0
                assert split.features[modality][present, 0].any(axis=1).all()
                stored = raw[f"{name}_{modality}"]
                assert np.array_equal(stored[stored.any(axis=2)], _rows(split.features[modality]))
    assert (data.splits["train"].lengths["video"] == 0).sum() > 100  # videos without a face


def _rows(features):
    return features[features.any(axis=2)]


@pytest.mark.parametrize("name", ["npz", "safetensors", "tailor"])
def test_converted_it_is_the_same(pom_dir, tmp_path, name):
    data = load(pom_dir / "pom_train_valid_test.pt")
    FORMATS[name].write(data, tmp_path / f"pom{FORMATS[name].suffix}")
    back = load(tmp_path / f"pom{FORMATS[name].suffix}")
    assert back.label_names == data.label_names
    for split, expected in data.splits.items():
        assert np.array_equal(back.splits[split].labels, expected.labels)
        for modality in data.modalities:
            assert np.array_equal(back.splits[split].lengths[modality], expected.lengths[modality])
            assert np.array_equal(back.splits[split].features[modality], expected.features[modality])


def test_inspecting_it(pom_dir):
    summary = summarise(load(pom_dir / "pom.npz"), "npz")
    assert summary["problem"] is None
    assert summary["splits"]["train"]["modalities"]["video"]["missing"] > 100
    assert all(0.3 < share < 0.7 for share in summary["splits"]["train"]["prevalence"].values())


def test_a_batch_of_it(pom_dir):
    split = load(pom_dir / "pom.npz", modalities=["video"]).splits["valid"]
    batch = SequenceDataset(split).__getitems__(range(len(split)))
    assert batch.labels.shape == (100, 17)
    assert batch.features["video"].shape[1] == batch.lengths["video"].max()
