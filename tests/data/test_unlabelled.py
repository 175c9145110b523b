"""Data for prediction: one split, without labels, in every format; what needs more says what is missing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from unlabelled import strip

from mmer_fast import cli
from mmer_fast.data import (
    FORMATS,
    DataError,
    MissingPart,
    MultiModalData,
    Needs,
    SequenceDataset,
    Split,
    load,
    no_labels,
)
from mmer_fast.data.labels import EMOTIONS
from mmer_fast.data.needs import EVERYTHING, FEATURES, for_prediction

TEST = for_prediction("test")
UNLABELLED = [name for name in FORMATS if name != "csd"]  # its labels say where segments begin and end


def run(*arguments: object) -> int:
    """Run a command line in this process; its exit code."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def written(name: str, data: MultiModalData, folder: Path) -> Path:
    path = folder / f"d{FORMATS[name].suffix}"
    FORMATS[name].write(data, path)
    return path


def same_features(got: Split, expected: Split) -> None:
    assert list(got.features) == list(expected.features)
    for name in expected.features:
        np.testing.assert_array_equal(got.features[name], expected.features[name])
        np.testing.assert_array_equal(got.lengths[name], expected.lengths[name])


@pytest.mark.parametrize("name", FORMATS)
def test_one_split_without_labels(name, emotional, tmp_path):
    path = written(name, emotional, tmp_path)
    whole = load(path)
    strip(name, path, ["test"])
    data = load(path, needs=TEST)
    assert list(data.splits) == ["test"]
    assert data.modalities == whole.modalities
    same_features(data.splits["test"], whole.splits["test"])
    assert data.splits["test"].labelled == (name == "csd")
    if name != "csd":
        assert data.label_names == []
        assert data.splits["test"].labels.shape == (len(whole.splits["test"]), 0)
    with pytest.raises(MissingPart):
        load(path)
    with pytest.raises(MissingPart, match=r"valid|trainVid|val_int2name"):
        load(path, needs=for_prediction("valid"))


@pytest.mark.parametrize("name", UNLABELLED)
def test_labels_in_some_splits(name, emotional, tmp_path):
    path = written(name, emotional, tmp_path)
    whole = load(path)
    strip(name, path, ["train", "valid", "test"], ["test"])
    data = load(path, needs=TEST)
    assert data.label_names == whole.label_names
    assert [split.labelled for split in data.splits.values()] == [True, True, False]
    for split in data.splits:
        same_features(data.splits[split], whole.splits[split])
    np.testing.assert_array_equal(data.splits["train"].labels, whole.splits["train"].labels)
    with pytest.raises(MissingPart, match=r"labels|tgt|tst_label|videoLabels"):
        load(path)


@pytest.mark.parametrize("name", FORMATS)
def test_labels_that_are_there_are_read(name, emotional, tmp_path):
    path = written(name, emotional, tmp_path)
    whole, again = load(path), load(path, needs=FEATURES)
    assert (again.label_names, again.notes) == (whole.label_names, whole.notes)
    for split in whole.splits:
        np.testing.assert_array_equal(again.splits[split].labels, whole.splits[split].labels)


def test_a_training_split_alone(emotional, tmp_path):
    for name in ("npz", "mult", "tailor"):
        path = written(name, emotional, tmp_path)
        strip(name, path, ["train"])
        assert list(load(path, needs=for_prediction("train")).splits) == ["train"]


def test_text_alone_in_a_folder_of_univa(emotional, tmp_path):
    path = written("univa", emotional, tmp_path)
    whole = load(path).select(["text"])
    for folder in ("A", "V"):
        for file in (path / folder).iterdir():
            file.unlink()
    same_features(load(path, needs=TEST).splits["test"], whole.splits["test"])
    with pytest.raises(MissingPart, match="they hold the labels"):
        load(path)


def test_lengths_of_an_unlabelled_mmsa_file_are_those_stated(emotional, tmp_path):
    path = written("mmsa", emotional, tmp_path)
    strip("mmsa", path, ["test"])
    content = pickle.loads(path.read_bytes())
    content["test"]["audio_lengths"] = [1] * 5
    path.write_bytes(pickle.dumps(content))
    assert load(path, needs=TEST).splits["test"].lengths["audio"].tolist() == [1] * 5
    content["test"]["audio_lengths"] = [7] * 5
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=r"test audio_lengths: expected whole numbers in \[0, 6\]; got 7"):
        load(path, needs=TEST)


def test_a_vocabulary_names_labels_that_are_not_there(emotional, tmp_path):
    path = written("tailor", emotional, tmp_path)
    strip("tailor", path, ["test"])
    content = torch.load(path, weights_only=False) | {"dict": {"one": 4, "two": 5}}
    torch.save(content, path)
    assert load(path, needs=TEST).label_names == ["one", "two"]


ARRAYS = {
    "counts": ({"test_video": np.zeros((3, 4, 3), np.float32)}, "expected 4 samples, as many as key test_text; got 3"),
    "no sample": ({"test_text": np.zeros((0, 6, 5), np.float32)}, "key test_text: expected at least one sample"),
    "no floats": ({"test_text": np.zeros((4, 6, 5), np.int64)}, r"key test_text: expected \(N, T, D\) floats"),
    "not finite": ({"test_text": np.full((4, 6, 5), np.nan, np.float32)}, "test text: expected finite values"),
    "length": ({"test_text_lengths": np.array([1, 2, 3, 7])}, r"key test_text_lengths: .* \[0, 6\]; got 7"),
    "labels": ({"test_labels": np.full((4, 2), 3)}, "key test_labels: expected only 0 and 1"),
    "label rows": ({"test_labels": np.zeros((5, 2))}, "expected 5 samples, as many as labels; got 4"),
    "other modality": ({"valid_smell": np.ones((4, 6, 5), np.float32)}, "missing key test_smell"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_features_are_checked_as_ever(case, make_small, tmp_path):
    changed, message = ARRAYS[case]
    split = make_small().splits["test"]
    arrays = {f"test_{name}": x for name, x in split.features.items()}
    arrays |= {f"test_{name}_lengths": x for name, x in split.lengths.items()}
    np.savez(tmp_path / "d.npz", **arrays)
    assert len(load(tmp_path / "d.npz", needs=TEST).splits["test"]) == 4
    np.savez(tmp_path / "d.npz", **(arrays | changed))
    with pytest.raises(DataError, match=message):
        load(tmp_path / "d.npz", needs=TEST)


def test_the_counts_of_samples_in_other_formats(emotional, tmp_path):
    for name, key in (("mult", "test text"), ("tailor", "test src-text")):
        path = written(name, emotional, tmp_path)
        strip(name, path, ["test"])
        content = torch.load(path, weights_only=False) if name == "tailor" else pickle.loads(path.read_bytes())
        video = "src-visual" if name == "tailor" else "vision"
        content["test"][video] = content["test"][video][:3]
        torch.save(content, path) if name == "tailor" else path.write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=f"{video}: expected 5 samples, as many as {key}; got 3"):
            load(path, needs=TEST)


def test_mmgcn_counts_utterances_by_their_text(emotional, tmp_path):
    path = written("mmgcn", emotional, tmp_path)
    whole = load(path)
    strip("mmgcn", path, ["test"])
    test = load(path, needs=TEST).splits["test"]
    for extra, values in whole.splits["test"].extras.items():
        np.testing.assert_array_equal(test.extras[extra], values)
    content = list(pickle.loads(path.read_bytes()))
    content[8] = ["absent"]
    path.write_bytes(pickle.dumps(tuple(content)))
    with pytest.raises(DataError, match="testVid: dialogue 'absent' is not in videoText"):
        load(path, needs=TEST)


def test_what_is_needed_of_data_in_memory(make_small):
    data = make_small()
    test = data.splits["test"]
    unlabelled = Split(test.features, test.lengths, no_labels(len(test)))
    alone = MultiModalData({"test": unlabelled}, [], data.modalities, "made for a test")
    assert alone.check(TEST) is alone
    assert len(alone.select(["text"]).check(FEATURES).splits["test"]) == 4
    with pytest.raises(MissingPart, match="splits: expected train, valid, test; got test"):
        alone.check()
    with pytest.raises(MissingPart, match="splits: expected valid; got test"):
        alone.check(for_prediction("valid"))
    with pytest.raises(MissingPart, match=r"test labels: expected \(N, K\) of 0 and 1; got none, they are not known"):
        MultiModalData({**data.splits, "test": unlabelled}, data.label_names, data.modalities, "").check(EVERYTHING)
    with pytest.raises(DataError, match="splits: expected test; got night"):
        MultiModalData({"night": unlabelled}, [], data.modalities, "").check(TEST)
    with pytest.raises(DataError, match="label_names: expected one or more distinct names"):
        MultiModalData({"test": test}, [], data.modalities, "").check(TEST)
    with pytest.raises(DataError, match="test labels: expected at least one sample"):
        MultiModalData({"test": Split(test.features, test.lengths, no_labels(0))}, [], data.modalities, "").check(TEST)
    assert SequenceDataset(unlabelled)[1].labels.shape == (1, 0)


def test_which_splits_are_looked_for():
    assert Needs().wanted(["test"]) == ("train", "valid", "test")
    assert TEST.wanted([]) == ("test",)
    assert TEST.wanted(["valid", "other"]) == ("valid", "test")
    assert FEATURES.wanted(["valid"]) == ("valid",)
    assert FEATURES.wanted([]) == ("train", "valid", "test")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("name", UNLABELLED)
def test_inspect_and_convert(name, suffix, emotional, tmp_path, capsys):
    path, out = written(name, emotional, tmp_path), tmp_path / f"out{suffix}"
    strip(name, path, ["test"])
    note = "no split train, valid; no labels in test: for predict and explain, not for training and evaluation"
    assert run("inspect", path) == 0
    shown = capsys.readouterr().out
    assert f"note: {note}" in shown
    assert "none of them" not in shown
    assert run("inspect", path, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["problem"], summary["notes"][-1]) == (None, note)
    test = summary["splits"]["test"]
    assert (test["samples"], test["labelled"], test["prevalence"], test["without_label"]) == (5, False, {}, None)
    assert run("convert", path, out) == 0
    assert f"note: {note}" in capsys.readouterr().out
    same_features(load(out, needs=TEST).splits["test"], load(path, needs=TEST).splits["test"])


def test_inspect_shows_the_labels_that_there_are(emotional, tmp_path, capsys):
    path = written("npz", emotional, tmp_path)
    strip("npz", path, ["train", "test"], ["test"])
    assert run("inspect", path) == 0
    shown = capsys.readouterr().out
    assert "note: no split valid; no labels in test: for predict" in shown
    (heading,) = [line for line in shown.splitlines() if "label " in line and "train" in line]
    assert "test" not in heading


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("npz", "safetensors")])
def test_others_formats_are_written_with_labels(name, emotional, tmp_path):
    test = emotional.splits["test"]
    unlabelled = Split(test.features, test.lengths, no_labels(len(test)))
    data = MultiModalData({**emotional.splits, "test": unlabelled}, list(EMOTIONS), emotional.modalities, "")
    with pytest.raises(DataError, match=r"is written with labels; test has none \(\.npz and \.safetensors do\)"):
        FORMATS[name].write(data, tmp_path / f"d{FORMATS[name].suffix}")
    assert list(tmp_path.iterdir()) == []
