from __future__ import annotations

import pickle

import numpy as np
import pytest

from mmer_fast.data import DataError, load
from mmer_fast.data.loading import read_unchecked

SIZES = {"train": 4, "valid": 2, "test": 3}


def _content(unaligned: bool = True) -> dict:
    """What an unaligned_50.pkl of MMSA holds, small."""
    rng = np.random.default_rng(0)
    content = {}
    for split, n in SIZES.items():
        sentiment = np.array([-1.5, 0, 2, 0.5], np.float32)[:n]
        content[split] = {
            "raw_text": np.array(["so it was good"] * n),
            "audio": rng.standard_normal((n, 7, 3)).astype(np.float32),
            "vision": rng.standard_normal((n, 6, 2)).astype(np.float64),
            "id": np.array([f"vid$_${i}" for i in range(n)], dtype=object),
            "text": rng.standard_normal((n, 5, 4)).astype(np.float32),
            "text_bert": np.stack([np.full((n, 5), 101), np.arange(5) < np.array([[4]] * n), np.zeros((n, 5))], axis=1),
            "annotations": np.array(["Negative", "Neutral", "Positive", "Positive"][:n]),
            "classification_labels": np.array([0, 1, 2, 2][:n], np.float32),
            "regression_labels": sentiment,
        }
        if unaligned:
            content[split]["audio_lengths"] = [5] * n
            content[split]["vision_lengths"] = np.full(n, 3)
            content[split]["audio"][:, 5:] = 0
            content[split]["vision"][:, 3:] = 0
    return content


def _load(tmp_path, content):
    (tmp_path / "unaligned_50.pkl").write_bytes(pickle.dumps(content, protocol=4))
    return load(tmp_path / "unaligned_50.pkl")


def test_unaligned_files(tmp_path):
    data = _load(tmp_path, _content())
    assert read_unchecked(tmp_path / "unaligned_50.pkl")[0].name == "mmsa"
    assert data.modalities == {"text": 4, "video": 2, "audio": 3}
    assert data.label_names == ["negative", "neutral", "positive"]
    train = data.splits["train"]
    assert train.labels.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert train.extras["sentiment"].tolist() == [-1.5, 0, 2, 0.5]
    assert [train.lengths[m].tolist() for m in data.modalities] == [[4] * 4, [3] * 4, [5] * 4]
    assert np.array_equal(train.features["video"][:, :3], _content()["train"]["vision"][:, :3].astype(np.float32))
    assert not train.features["text"][:, 4].any()  # BERT's vectors of padding are not zero in the file
    assert "text: values past the given lengths set to zero" in data.notes


def test_aligned_files_leave_lengths_to_be_derived(tmp_path):
    content = _content(unaligned=False)
    content["train"]["audio"][0, 4:] = 0
    content["train"]["vision"][1, :2] = 0
    data = _load(tmp_path, content)
    assert data.splits["train"].lengths["audio"].tolist() == [4, 7, 7, 7]
    assert data.splits["train"].lengths["video"].tolist() == [6, 4, 6, 6]
    assert "video: lengths derived from all-zero rows; padding in front removed, so sequences start at 0" in data.notes


def test_given_lengths_with_padding_in_front_lose_nothing(tmp_path):
    content = _content()
    kept = content["test"]["audio"][1, :5].copy()
    content["test"]["audio"][1, 2:], content["test"]["audio"][1, :2] = kept, 0
    data = _load(tmp_path, content)
    assert np.array_equal(data.splits["test"].features["audio"][1, :5], kept)
    assert "audio: padding in front removed, so sequences start at 0" in data.notes


def test_without_classes_the_sign_of_the_sentiment_is_the_label(tmp_path):
    content = _content()
    for split in SIZES:
        del content[split]["classification_labels"]
    data = _load(tmp_path, content)
    assert data.label_names == ["negative", "neutral", "positive"]
    assert data.splits["train"].labels.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert any("negative (< 0), neutral (= 0), positive (> 0)" in note for note in data.notes)


def test_classes_without_one_annotation_each_are_numbered(tmp_path):
    content = _content()
    content["train"]["annotations"][3] = "Weakly"
    assert _load(tmp_path, content).label_names == ["class_0", "class_1", "class_2"]
    for split in SIZES:
        del content[split]["annotations"]
        content[split]["classification_labels"] -= 1
    assert _load(tmp_path, content).label_names == ["class_-1", "class_0", "class_1"]


def test_minus_infinity_in_audio_becomes_zero(tmp_path):
    content = _content()
    content["train"]["audio"][1, 2, 0] = -np.inf
    data = _load(tmp_path, content)
    assert data.splits["train"].features["audio"][1, 2, 0] == 0
    assert "audio: -inf replaced by 0" in data.notes


WRONG = {
    "split": (lambda c: c.pop("valid"), "missing split valid; got keys train, test"),
    "modality": (lambda c: c["test"].pop("vision"), "test: missing key vision; got raw_text"),
    "no modality": (lambda c: [c["train"].pop(k) for k in ("text", "audio", "vision")], "train: expected some of text"),
    "labels": (
        lambda c: [c["test"].pop(k) for k in ("classification_labels", "regression_labels")],
        "test: missing key regression_labels",
    ),
    "N": (
        lambda c: c["test"].update(text=c["test"]["text"][1:]),
        "test text: expected 3 samples, as many as labels; got 2",
    ),
    "rank": (
        lambda c: c["test"].update(text=c["test"]["text"][:, 0]),
        r"test text: expected \(N, T, D\) floats; got float32 of",
    ),
    "kind": (lambda c: c["test"].update(text=["a"] * 3), "test text: expected .* floats; got list of 3"),
    "empty axis": (lambda c: c["test"].update(text=c["test"]["text"][:, :0]), r"\(N, T >= 1, D >= 1\)"),
    "length": (lambda c: c["test"].update(audio_lengths=[5, 8, 5]), r"test audio_lengths: .* \[0, 7\]; got 8"),
    "fraction": (lambda c: c["test"].update(audio_lengths=[5, 1.5, 5]), r"got 1\.5"),
    "length count": (
        lambda c: c["test"].update(audio_lengths=[5]),
        r"test audio_lengths: expected \(3,\) integers; got list of 1",
    ),
    "length kind": (lambda c: c["test"].update(audio_lengths="abc"), "test audio_lengths: expected .* got str"),
    "class": (
        lambda c: c["test"].update(classification_labels=np.array([0, 0.5, 1])),
        "classification_labels: expected at most 20 whole class numbers",
    ),
    "class shape": (
        lambda c: c["test"].update(classification_labels=np.ones((3, 2))),
        "test classification_labels: expected one number a sample",
    ),
    "NaN label": (
        lambda c: c["test"].update(regression_labels=np.array([1, np.nan, 0])),
        "test regression_labels: expected finite numbers; got nan",
    ),
    "label kind": (
        lambda c: c["test"].update(regression_labels=["a", "b", "c"]),
        "regression_labels: expected numbers",
    ),
    "NaN": (
        lambda c: c["test"]["vision"].__setitem__((1, 2, 0), np.nan),
        "test video: expected finite .* sample 1, step 2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused(tmp_path, case):
    content = _content()
    damage, message = WRONG[case]
    damage(content)
    with pytest.raises(DataError, match=message):
        _load(tmp_path, content)
