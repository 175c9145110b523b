from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

from mmer_fast.data import DataError, load
from mmer_fast.data.loading import read_unchecked

VIDEOS = ["a", "b", "c", "d[x]"]
FOLDS = {"train": ["a", "b"], "valid": ["c"], "test": ["d[x]"]}
FILES = {"CMU_MOSEI_TimestampedWordVectors": 3, "CMU_MOSEI_COVAREP": 2, "CMU_MOSEI_VisualFacet42": 4}
STEPS = np.array([[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6]], float)
SEGMENTS = np.array([[0, 2], [2.4, 5], [5, 6.5]])  # steps 0, 1 | 2 (its middle is 2.5), 3, 4 | 5


def _file(path, entries, root=None):
    with h5py.File(path, "w") as h5:
        group = h5.create_group(f"{root or path.stem}/data")
        for name, (features, intervals) in entries.items():
            group.create_dataset(f"{name}/features", data=features)
            group.create_dataset(f"{name}/intervals", data=intervals)
        h5.create_group(f"{root or path.stem}/metadata")


def _labels() -> dict:
    """Columns sentiment, happy, sad, anger, surprise, disgust, fear of every video's three segments."""
    rows = np.array([[1.5, 2 / 3, 0, 0, 0, 0, 0], [-1, 0, 1, 1 / 3, 0, 0, 0], [0, 0, 0, 0, 0, 0, 3]])
    return {video: (rows, SEGMENTS) for video in VIDEOS}


def _features(size: int) -> dict:
    rng = np.random.default_rng(size)
    return {video: (rng.standard_normal((6, size)).astype(np.float32), STEPS) for video in VIDEOS}


def _write(folder, labels=None, folds=FOLDS, **changed):
    for stem, size in FILES.items():
        _file(folder / f"{stem}.csd", changed.get(stem, _features(size)))
    _file(folder / "CMU_MOSEI_Labels.csd", labels or _labels(), "All Labels")
    if folds is not None:
        (folder / "splits.json").write_text(folds if isinstance(folds, str) else json.dumps(folds))
    return folder


def test_steps_belong_to_the_segment_that_holds_their_middle(tmp_path):
    data = load(_write(tmp_path))
    assert read_unchecked(tmp_path)[0].name == "csd"
    assert data.modalities == {"text": 3, "video": 4, "audio": 2}
    assert data.label_names == ["happy", "sad", "anger", "surprise", "disgust", "fear"]
    train = data.splits["train"]
    assert train.extras["id"].tolist() == ["a[0]", "a[1]", "a[2]", "b[0]", "b[1]", "b[2]"]
    assert train.labels[:3].tolist() == [[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]
    for modality, size in data.modalities.items():
        assert train.lengths[modality].tolist() == [2, 3, 1] * 2
        features = _features(size)["b"][0]
        assert np.array_equal(train.features[modality][4, :3], features[2:5])
        assert np.array_equal(train.features[modality][5, :1], features[5:])
    assert data.splits["test"].extras["id"].tolist() == ["d[x][0]", "d[x][1]", "d[x][2]"]


def test_a_step_on_the_border_of_two_segments_belongs_to_the_later_one(tmp_path):
    borders = np.array([[0, 1.5], [1.5, 4], [4, 6]])  # the middle of step 1 is 1.5
    labels = {video: (rows, borders) for video, (rows, _) in _labels().items()}
    train = load(_write(tmp_path, labels)).splits["train"]
    assert all(lengths.tolist() == [1, 3, 2] * 2 for lengths in train.lengths.values())


def test_segments_come_in_the_order_of_time(tmp_path):
    labels = {video: (rows[[2, 0, 1]], times[[2, 0, 1]]) for video, (rows, times) in _labels().items()}
    train = load(_write(tmp_path, labels)).splits["train"]
    assert train.extras["id"].tolist() == ["a[1]", "a[2]", "a[0]", "b[1]", "b[2]", "b[0]"]
    assert train.lengths["text"].tolist() == [2, 3, 1] * 2
    assert train.labels[:3].tolist() == [[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]


def test_steps_of_zeros_count_where_all_segments_have_as_many(tmp_path):
    pairs = np.array([[0, 2], [2, 4], [4, 6]])
    silent = {video: (np.zeros_like(rows), times) for video, (rows, times) in _features(3).items()}
    labels = {video: (rows, pairs) for video, (rows, _) in _labels().items()}
    train = load(_write(tmp_path, labels, CMU_MOSEI_TimestampedWordVectors=silent)).splits["train"]
    assert train.lengths["text"].tolist() == [2] * 6


def test_a_file_names_its_folder(tmp_path):
    _write(tmp_path)
    assert load(tmp_path / "CMU_MOSEI_COVAREP.csd").modalities == {"text": 3, "video": 4, "audio": 2}


def test_the_aligned_form(tmp_path):
    def aligned(entries):
        return {f"{v}[{k}]": (x[k : k + 1], t[k : k + 1]) for v, (x, t) in entries.items() for k in range(len(x))}

    rng = np.random.default_rng(0)
    steps = {
        f"{video}[{k}]": (rng.standard_normal((k + 1, 3)).astype(np.float32), np.tile(SEGMENTS[k], (k + 1, 1)))
        for video in VIDEOS
        for k in range(3)
    }
    _write(tmp_path, aligned(_labels()), CMU_MOSEI_TimestampedWordVectors=steps)
    train = load(tmp_path).splits["train"]
    assert train.extras["id"].tolist() == ["a[0]", "a[1]", "a[2]", "b[0]", "b[1]", "b[2]"]
    assert train.lengths["text"].tolist() == [1, 2, 3] * 2
    assert np.array_equal(train.features["text"][4, :2], steps["b[1]"][0])
    assert train.lengths["audio"].tolist() == [2, 3, 1] * 2  # not aligned in its file: by time


def test_missing_steps_and_videos_are_said(tmp_path):
    text, audio, video = _features(3), _features(2), _features(4)
    del text["a"]
    for entries in (text, audio, video):
        entries["b"] = (entries["b"][0][:2], STEPS[:2])  # nothing after the first segment
    _write(
        tmp_path,
        folds=FOLDS | {"valid": ["zz", "c"], "test": ["d[x]"], "train": ["a", "b"]},
        CMU_MOSEI_TimestampedWordVectors=text,
        CMU_MOSEI_COVAREP=audio,
        CMU_MOSEI_VisualFacet42=video,
    )
    data = load(tmp_path)
    train = data.splits["train"]
    assert train.extras["id"].tolist() == ["a[0]", "a[1]", "a[2]", "b[0]"]
    assert train.lengths["text"].tolist() == [0, 0, 0, 2]
    assert "train: 2 segments without a step in any modality left out" in data.notes
    assert "valid: 1 of 2 videos have no labels, left out" in data.notes


def test_videos_in_no_split_are_said(tmp_path):
    data = load(_write(tmp_path, folds=FOLDS | {"train": ["b"]}))
    assert len(data.splits["train"]) == 3
    assert "1 of 4 videos are in no split, left out" in data.notes


def test_names_of_modalities_and_files_without_numbers(tmp_path):
    _write(tmp_path)
    _file(tmp_path / "CMU_MOSEI_openSMILE-IS09.csd", _features(5))  # a second audio: both go by their files' names
    _file(tmp_path / "gaze.csd", _features(2))
    words = {video: (np.array([[b"so"]] * 6), STEPS) for video in VIDEOS}
    _file(tmp_path / "CMU_MOSEI_TimestampedWords.csd", words)
    data = load(tmp_path)
    assert set(data.modalities) == {"text", "video", "cmu_mosei_covarep", "cmu_mosei_opensmile_is09", "gaze"}
    assert "CMU_MOSEI_TimestampedWords.csd: holds no numbers, left out" in data.notes


def test_minus_infinity_in_audio_becomes_zero(tmp_path):
    audio = _features(2)
    audio["a"][0][0, 0] = -np.inf
    data = load(_write(tmp_path, CMU_MOSEI_COVAREP=audio))
    assert data.splits["train"].features["audio"][0, 0, 0] == 0
    assert "audio: -inf replaced by 0" in data.notes


def test_a_sentiment_alone(tmp_path):
    data = load(_write(tmp_path, {video: (x[:, :1], t) for video, (x, t) in _labels().items()}))
    assert data.label_names == ["negative", "neutral", "positive"]
    assert data.splits["valid"].labels.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]


FOLD_ERRORS = {
    None: r'do not say which video belongs to which split; write splits\.json .*"train": \[video ids\]',
    "{": "splits.json: expected JSON",
    '{"train": []}': r'splits.json: expected \{"train"',
    '{"train": ["a"], "valid": ["c"], "test": 3}': "splits.json: test: expected a list of video ids",
    '{"train": ["a"], "valid": ["a"], "test": ["b"]}': "video 'a': expected in one split; got train and valid",
    '{"train": ["a"], "valid": ["c"], "test": ["zz"]}': "splits.json: test: expected a segment with steps; got none",
}


@pytest.mark.parametrize("folds", FOLD_ERRORS)
def test_wrong_splits_are_refused(tmp_path, folds):
    with pytest.raises(DataError, match=FOLD_ERRORS[folds]):
        load(_write(tmp_path, folds=folds))


def _with(entries, **changed):
    return {**entries, **changed}


COVAREP = "CMU_MOSEI_COVAREP"
WRONG = {
    "intervals": (
        {COVAREP: _with(_features(2), a=(np.ones((6, 2), np.float32), STEPS[1:]))},
        "'a': expected features .* and",
    ),
    "D": ({COVAREP: _with(_features(2), b=(np.ones((6, 3), np.float32), STEPS))}, "'b': expected 2 features; got 3"),
    "dtype": (
        {COVAREP: _with(_features(2), b=(np.ones((6, 2), int), STEPS))},
        "'features': expected numbers of 2 axes; got int64",
    ),
    "rank": (
        {COVAREP: _with(_features(2), b=(np.ones((6, 2, 1), np.float32), STEPS))},
        r"2 axes; got float32 of shape \(6, 2, 1\)",
    ),
    "label columns": ({"labels": {v: (x[:, :5], t) for v, (x, t) in _labels().items()}}, "expected 1 column .* got 5"),
    "labels differ": (
        {"labels": _with(_labels(), b=(np.ones((3, 6)), SEGMENTS))},
        "'b': expected 7 label columns; got 6",
    ),
    "NaN": (
        {COVAREP: _with(_features(2), a=(np.full((6, 2), np.nan, np.float32), STEPS))},
        "train audio: expected finite",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_folder_is_refused(tmp_path, case):
    changed, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        load(_write(tmp_path, **changed))


def test_files_of_another_structure_are_refused(tmp_path):
    _write(tmp_path)
    path = tmp_path / "CMU_MOSEI_COVAREP.csd"

    def refused(match):
        with pytest.raises(DataError, match=match):
            load(tmp_path)

    for groups, message in (
        (["x/data", "y/data"], "expected one root group; got x, y"),
        (["x/features"], "missing 'data'; got features"),
        (["x/data"], "data: expected an entry a video; got none"),
        (["x/data/a/intervals"], "missing 'features'"),
    ):
        with h5py.File(path, "w") as h5:
            for group in groups:
                h5.create_group(group)
        refused(rf"COVAREP\.csd: .*{message}")
    path.write_bytes(b"text")
    refused(r"COVAREP\.csd: not a readable HDF5 file")
    path.rename(tmp_path / "second_labels.csd")
    _file(tmp_path / "second_labels.csd", _labels())
    refused("expected one .csd of labels .*; got CMU_MOSEI_Labels.csd, second_labels.csd")


def test_what_lies_in_other_files_is_refused(tmp_path):
    secret = tmp_path / "elsewhere.bin"
    np.zeros((6, 2), np.float32).tofile(secret)
    _write(tmp_path)
    path = tmp_path / "CMU_MOSEI_COVAREP.csd"
    with h5py.File(path, "a") as h5:
        entry = h5["CMU_MOSEI_COVAREP/data/a"]
        del entry["features"]
        entry.create_dataset("features", (6, 2), "f4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
    with pytest.raises(DataError, match="'features': values in other files are refused"):
        load(tmp_path)
    with h5py.File(path, "a") as h5:
        entry = h5["CMU_MOSEI_COVAREP/data/a"]
        del entry["features"]
        entry["features"] = h5py.ExternalLink("CMU_MOSEI_Labels.csd", "All Labels/data/a/features")
    with pytest.raises(DataError, match="'features': a link to another place is refused"):
        load(tmp_path)
