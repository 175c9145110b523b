from __future__ import annotations

import pickle

import numpy as np
import pytest

from mmer_fast.data import DataError, load, make_synthetic
from mmer_fast.data.loading import read_unchecked
from mmer_fast.data.univa import write_univa

SIZES = {"train": 4, "valid": 2, "test": 3}
NAMES = {"audio": "audio_utt", "vision": "vision_utt", "text": "text_glove300"}


def _contents() -> dict:
    """(split, modality) -> what UniVA's pickle holds, small; all sequences have 3 of 5 steps."""
    rng = np.random.default_rng(0)
    contents = {}
    for split, n in SIZES.items():
        labels = rng.integers(0, 2, size=(n, 6))
        for key, size in (("audio", 4), ("vision", 2), ("text", 3)):
            features = rng.standard_normal((n, 5, size))
            features[:, 3:] = 0
            section = {
                key: features,
                f"{key}_utt_mask": np.array([[1, 1, 1, 0, 0]] * n),
                f"{key}_VA_values": [[2.5, 3.0] for _ in range(n)],
            }
            if key != "text":
                section = {split: section | {"labels_class": labels}, "num_labels": 6}
            contents[split, key] = section
    return contents


def _write(folder, contents, nested=False):
    for (split, key), content in contents.items():
        place = folder / {"audio": "A", "vision": "V", "text": "T"}[key] if nested else folder
        place.mkdir(exist_ok=True)
        (place / f"MOSEI_{split}_{NAMES[key]}_VA.pkl").write_bytes(pickle.dumps(content))
    return folder


@pytest.mark.parametrize("nested", [True, False])
def test_a_set_of_files(tmp_path, nested):
    contents = _contents()
    data = load(_write(tmp_path, contents, nested))
    assert read_unchecked(tmp_path)[0].name == "univa"
    assert data.modalities == {"text": 3, "video": 2, "audio": 4}
    assert data.label_names == [f"label_{k}" for k in range(6)]
    for split in SIZES:
        assert np.array_equal(data.splits[split].labels, contents[split, "audio"][split]["labels_class"])
        assert set(data.splits[split].lengths["text"].tolist()) == {3}
        text = contents[split, "text"]["text"].astype(np.float32)
        assert np.array_equal(data.splits[split].features["text"], text)
        assert data.splits[split].extras["va_audio"].tolist() == [[2.5, 3.0]] * SIZES[split]
    assert data.notes == ["labels are numbered: the file does not name its 6 labels"]


@pytest.mark.parametrize("nested", [True, False])
def test_one_of_the_files_names_the_set(tmp_path, nested):
    _write(tmp_path, _contents(), nested)
    file = next(tmp_path.rglob("*train_audio_utt_VA.pkl"))
    assert load(file).modalities == {"text": 3, "video": 2, "audio": 4}


def test_without_text(tmp_path):
    contents = {key: content for key, content in _contents().items() if key[1] != "text"}
    assert load(_write(tmp_path, contents)).modalities == {"video": 2, "audio": 4}


def test_scores_survive_writing(tmp_path):
    data = make_synthetic(1, n_train=4, n_valid=2, n_test=3, max_length=8)
    del data.splits["test"].extras["va_audio"]
    write_univa(data, tmp_path / "set")
    again = load(tmp_path / "set")
    for split in SIZES:
        for modality in ("text", "video"):
            expected = data.splits[split].extras[f"va_{modality}"]
            assert np.array_equal(again.splits[split].extras[f"va_{modality}"], expected)
    assert np.array_equal(again.splits["train"].extras["va_audio"], data.splits["train"].extras["va_audio"])
    assert not again.splits["test"].extras["va_audio"].any()


def test_padding_in_front(tmp_path):
    contents = _contents()
    section = contents["train", "audio"]["train"]
    kept = section["audio"][1, :3].astype(np.float32)
    section["audio"][1] = section["audio"][1][[3, 4, 0, 1, 2]]
    section["audio_utt_mask"][1] = [0, 0, 1, 1, 1]
    data = load(_write(tmp_path, contents))
    assert np.array_equal(data.splits["train"].features["audio"][1, :3], kept)
    assert "audio: padding in front removed, so sequences start at 0" in data.notes


def _audio(contents, **items):
    contents["test", "audio"]["test"].update(items)


WRONG = {
    "file": (lambda c: c.pop(("valid", "audio")), "text, video, audio in every split; missing valid audio"),
    "only text": (
        lambda c: [c.pop(k) for k in list(c) if k[1] != "text"],
        "audio or vision files beside those of text",
    ),
    "split": (lambda c: c["test", "audio"].pop("test"), r"test_audio_utt_VA\.pkl: missing key test; got num_labels"),
    "features": (
        lambda c: c["test", "text"].pop("text"),
        r"text_glove300_VA\.pkl: missing key text; got text_utt_mask",
    ),
    "mask": (lambda c: c["test", "text"].pop("text_utt_mask"), "missing key text_utt_mask"),
    "labels": (lambda c: c["test", "audio"]["test"].pop("labels_class"), "missing key labels_class"),
    "label value": (
        lambda c: _audio(c, labels_class=np.full((3, 6), 2)),
        r"labels_class: expected \(N, K\) of 0 and 1",
    ),
    "other labels": (
        lambda c: _audio(c, labels_class=1 - c["test", "audio"]["test"]["labels_class"]),
        "labels_class: expected the labels of the other modality's file",
    ),
    "num_labels": (lambda c: c["test", "audio"].update(num_labels=7), "num_labels: expected 6, .*; got 7"),
    "mask shape": (lambda c: _audio(c, audio_utt_mask=np.ones((3, 4))), r"audio_utt_mask: expected shape \(3, 5\)"),
    "mask in pieces": (
        lambda c: _audio(c, audio_utt_mask=np.array([[1, 0, 1, 0, 0]] * 3)),
        "audio_utt_mask: sample 0: expected ones in one piece",
    ),
    "inverted mask": (
        lambda c: _audio(c, audio_utt_mask=np.array([[0, 0, 0, 1, 1]] * 3)),
        "sample 0: expected only zero features where the mask is 0",
    ),
    "VA values": (lambda c: _audio(c, audio_VA_values=[[1.0]]), "audio_VA_values: expected 3 rows; got 1"),
    "not a dict": (lambda c: c.update({("test", "audio"): [1]}), r"expected a dict with test; got list of 1"),
    "N": (
        lambda c: c["test", "text"].update(text=np.ones((2, 5, 3))),
        "text: expected 3 samples, as many as labels_class; got 2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_set_is_refused(tmp_path, case):
    contents = _contents()
    damage, message = WRONG[case]
    damage(contents)
    with pytest.raises(DataError, match=message):
        load(_write(tmp_path, contents))


def test_two_data_sets_in_a_folder_are_refused(tmp_path):
    _write(tmp_path, _contents())
    (tmp_path / "M3ED_train_audio_utt_VA.pkl").write_bytes(b"")
    with pytest.raises(DataError, match="expected the files of one data set; got M3ED, MOSEI"):
        load(tmp_path)
