from __future__ import annotations

import pickle

import numpy as np
import pytest

from mmer_fast.data import DataError, load
from mmer_fast.data.loading import read_unchecked

SIZES = {"train": 4, "valid": 2, "test": 3}


def _content(labels) -> dict:
    """What a mosei_senti_data.pkl of MulT holds, small; ``labels(rng, n)`` makes the labels."""
    rng = np.random.default_rng(0)
    return {
        split: {
            "vision": rng.standard_normal((n, 5, 2)),
            "text": rng.standard_normal((n, 5, 3)).astype(np.float32),
            "audio": rng.standard_normal((n, 5, 4)).astype(np.float32),
            "labels": labels(rng, n),
            "id": np.array([[b"vid", b"0.5", b"1.5"]] * n),
        }
        for split, n in SIZES.items()
    }


def _sentiment(rng, n):
    return np.array([-2.0, 0, 1, 3])[:n].reshape(n, 1, 1)


def _load(tmp_path, content, protocol=4):
    (tmp_path / "mosei_senti_data.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    return load(tmp_path / "mosei_senti_data.pkl")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_sentiment_becomes_classes(tmp_path, protocol):
    content = _content(_sentiment)
    content["train"]["text"][0, :2] = 0
    data = _load(tmp_path, content, protocol)
    assert read_unchecked(tmp_path / "mosei_senti_data.pkl")[0].name == "mult"
    assert data.modalities == {"text": 3, "video": 2, "audio": 4}
    assert data.label_names == ["negative", "neutral", "positive"]
    assert data.splits["train"].labels.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert data.splits["train"].lengths["text"].tolist() == [3, 5, 5, 5]
    assert any("negative (< 0)" in note for note in data.notes)
    assert any("text: lengths derived" in note and "in front" in note for note in data.notes)
    assert data.splits["test"].features["video"].dtype == np.float32


def test_iemocap_pairs(tmp_path):
    def pairs(rng, n):
        present = np.array([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]])[:n]
        return np.stack([1 - present, present], axis=2)

    data = _load(tmp_path, _content(pairs))
    assert data.label_names == ["neutral", "happy", "sad", "angry"]
    assert data.splits["train"].labels.tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("shape", [(-1, 1, 6), (-1, 6), (-1, 6, 1), (-1, 1, 7), (-1, 7)])
def test_emotion_columns(tmp_path, shape):
    width = 7 if 7 in shape else 6
    content = _content(lambda rng, n: (rng.random((n, width)) * 3 - 1).reshape(shape))
    data = _load(tmp_path, content)
    assert data.label_names == ["happy", "sad", "anger", "surprise", "disgust", "fear"]
    expected = content["train"]["labels"].reshape(4, width)[:, -6:] > 0
    assert np.array_equal(data.splits["train"].labels, expected)


def test_minus_infinity_in_audio_becomes_zero(tmp_path):
    content = _content(_sentiment)
    content["valid"]["audio"][1, 2, 0] = -np.inf
    data = _load(tmp_path, content)
    assert data.splits["valid"].features["audio"][1, 2, 0] == 0
    assert "audio: -inf replaced by 0" in data.notes


WRONG = {
    "split": (lambda c: c.pop("test"), "missing split test; got keys train, valid"),
    "section": (lambda c: c.update(test=[1]), "missing split test"),
    "modality": (lambda c: c["test"].pop("text"), "test: missing key text; got vision, audio, labels, id"),
    "labels": (lambda c: c["test"].pop("labels"), "test: missing key labels"),
    "N": (
        lambda c: c["test"].update(text=c["test"]["text"][1:]),
        "test text: expected 3 samples, as many as labels; got 2",
    ),
    "dtype": (lambda c: c["test"].update(text=np.ones((3, 5, 3), int)), "test text: expected .* floats; got int64"),
    "D": (
        lambda c: c["test"].update(text=c["test"]["text"][..., :2]),
        r"test text: expected \(N, T >= 1, 3\); got shape",
    ),
    "columns": (
        lambda c: c["test"].update(labels=np.ones((3, 1, 5))),
        r"test labels: expected 1 column .*, 6 .* or 7 .*; got 5",
    ),
    "label rank": (
        lambda c: c["test"].update(labels=np.ones((3, 2, 3))),
        r"test labels: expected \(N, 1, 1\), .*\(3, 2, 3\)",
    ),
    "other labels": (
        lambda c: c["test"].update(labels=np.ones((3, 1, 6))),
        "test labels: expected 3 as in train; got 6",
    ),
    "label NaN": (
        lambda c: c["test"].update(labels=np.full((3, 1, 1), np.nan)),
        "test labels: expected finite numbers",
    ),
    "no labels": (
        lambda c: c["test"].update(labels=np.ones((0, 1, 1))),
        "test labels: expected numbers, one row a sample",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused(tmp_path, case):
    content = _content(_sentiment)
    damage, message = WRONG[case]
    damage(content)
    with pytest.raises(DataError, match=message):
        _load(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "got"),
    [({"x": 1, "y": 2}, "got the keys x, y"), (np.ones(3), r"got float64 of shape \(3,\)"), ("text", "got str")],
)
def test_a_pickle_of_no_known_layout_is_described(tmp_path, content, got):
    with pytest.raises(
        DataError, match=rf"expected a \.pkl of MMSA .*, a \.pkl of MulT .*, a \.pkl of MMGCN .*; {got}"
    ):
        _load(tmp_path, content)
