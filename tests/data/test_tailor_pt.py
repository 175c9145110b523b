from __future__ import annotations

from argparse import Namespace

import numpy as np
import pytest
import torch

from mmer_fast.data import DataError, load

SIZES = {"train": 4, "valid": 2, "test": 3}
MOSEI = {"src-text": 6, "src-visual": 3, "src-audio": 4}


def _content(keys=MOSEI, steps=5, as_type=lambda x: x, largest=9):
    """A valid file's content; the first training sample has every label up to ``largest``."""
    rng = np.random.default_rng(0)
    content = {}
    for split, n in SIZES.items():
        content[split] = {
            key: [as_type(rng.standard_normal((steps, size)).astype(np.float32)) for _ in range(n)]
            for key, size in keys.items()
        }
        content[split]["tgt"] = [[2, 4, 6, 3], [2, 3], [2, 5, 3], [2, 8, 4, 3]][:n]
    content["train"]["tgt"][0] = [2, *range(4, largest + 1), 3]
    return content


def _load(tmp_path, content, **kwargs):
    torch.save(content, tmp_path / "train_valid_test.pt", **kwargs)
    return load(tmp_path / "train_valid_test.pt")


STORED = {
    "arrays": lambda x: x,
    "tensors": torch.from_numpy,
    "double arrays": lambda x: x.astype(np.float64),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("as_type", STORED.values(), ids=STORED)
def test_mosei_layout(tmp_path, as_type, zipped):
    data = _load(tmp_path, _content(as_type=as_type), _use_new_zipfile_serialization=zipped)
    assert data.label_names == ["happy", "sad", "anger", "surprise", "disgust", "fear"]
    assert data.modalities == {"text": 6, "video": 3, "audio": 4}
    assert data.splits["train"].labels.tolist() == [[1] * 6, [0] * 6, [0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 1, 0]]
    reference = _content()
    for split in SIZES:
        for key, name in (("src-text", "text"), ("src-visual", "video"), ("src-audio", "audio")):
            assert np.array_equal(data.splits[split].features[name], np.stack(reference[split][key]))


def test_stacked_arrays_and_tensor_targets(tmp_path):
    content = _content()
    for split in content.values():
        for key in MOSEI:
            split[key] = np.stack(split[key])
        longest = max(map(len, split["tgt"]))
        split["tgt"] = torch.tensor([row + [0] * (longest - len(row)) for row in split["tgt"]])
    plain, stacked = _load(tmp_path, _content()), _load(tmp_path, content)
    for split in SIZES:
        assert np.array_equal(plain.splits[split].labels, stacked.splits[split].labels)
        assert np.array_equal(plain.splits[split].features["text"], stacked.splits[split].features["text"])


def test_padding_in_front_is_removed(tmp_path):
    content = _content()
    kept = content["valid"]["src-text"][0][3:].copy()
    content["valid"]["src-text"][0][:3] = 0
    data = _load(tmp_path, content)
    assert data.splits["valid"].lengths["text"].tolist() == [2, 5]
    assert np.array_equal(data.splits["valid"].features["text"][0, :2], kept)
    assert any("text: lengths derived from all-zero rows; padding in front" in note for note in data.notes)


def test_samples_of_different_lengths_keep_them(tmp_path):
    content = _content()
    content["test"]["src-visual"][1] = np.zeros((2, 3), np.float32)
    data = _load(tmp_path, content)
    assert data.splits["test"].lengths["video"].tolist() == [5, 2, 5]


def test_minus_infinity_in_audio_becomes_zero_and_is_noted(tmp_path):
    content = _content()
    content["train"]["src-audio"][1][2, 0] = -np.inf
    data = _load(tmp_path, content)
    assert data.splits["train"].features["audio"][1, 2, 0] == 0
    assert "audio: -inf replaced by 0" in data.notes


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [("src-audio", np.inf, "audio"), ("src-audio", np.nan, "audio"), ("src-text", -np.inf, "text")],
)
def test_other_values_that_are_not_finite_are_refused(tmp_path, key, value, name):
    content = _content()
    content["train"][key][1][2, 0] = value
    with pytest.raises(DataError, match=f"train {name}: expected finite values; .* sample 1, step 2"):
        _load(tmp_path, content)


def test_nemu_keys_and_single_vectors(tmp_path):
    content = _content({"lyr": 5, "com": 4, "img": 7, "aud": 3}, largest=11)
    for split in content.values():
        split["img"] = [image[0] for image in split["img"]]
    data = _load(tmp_path, content)
    assert data.modalities == {"lyrics": 5, "comments": 4, "image": 7, "audio": 3}
    assert data.splits["test"].features["image"].shape == (3, 1, 7)
    assert data.label_names == [f"label_{k}" for k in range(8)]


@pytest.mark.parametrize("nested", [True, False])
def test_hhmpn_dictionary_names_the_labels(tmp_path, nested):
    names = ["joy", "grief", "rage", "awe", "scorn", "dread", "calm"]
    words = {"<blank>": 0, "<unk>": 1, "<s>": 2, "</s>": 3} | {name: 4 + k for k, name in enumerate(names)}
    content = _content() | {
        "settings": Namespace(max_len=60),  # as its authors' code saves them
        "dict": {"src": {}, "tgt": words} if nested else words,
    }
    data = _load(tmp_path, content)
    assert data.label_names == names
    assert data.splits["train"].labels.shape == (4, 7)


WRONG = {
    "split": (lambda c: c.pop("valid"), "missing split valid; .* got keys train, test"),
    "tgt": (lambda c: c["test"].pop("tgt"), "test: missing key tgt"),
    "modality": (
        lambda c: c["test"].pop("src-audio"),
        "test: expected the modalities of train; they differ in src-audio",
    ),
    "no modality": (lambda c: [c["train"].pop(k) for k in MOSEI], "train: expected some of src-text"),
    "two audios": (lambda c: [c[s].update(aud=c[s]["src-audio"]) for s in SIZES], "one of src-audio and aud"),
    "N": (lambda c: c["test"]["src-text"].pop(), "test src-text: expected 3 samples, as many as tgt; got 2"),
    "D": (
        lambda c: c["test"]["src-text"].__setitem__(1, np.zeros((5, 7), np.float32)),
        "test src-text: sample 1: expected 6 features; got 7",
    ),
    "D of split": (
        lambda c: c["test"].update({"src-text": [x[:, :5] for x in c["test"]["src-text"]]}),
        r"test text: expected \(N, T >= 1, 6\); got shape \(3, 5, 5\)",
    ),
    "dtype": (
        lambda c: c["test"]["src-text"].__setitem__(1, np.zeros((5, 6), int)),
        r"test src-text: sample 1: expected \(T, D\) floats; got int64",
    ),
    "sample type": (
        lambda c: c["test"]["src-text"].__setitem__(1, "x"),
        r"expected \(T, D\) floats; got str",
    ),
    "not a list": (lambda c: c["test"].update({"src-text": 3}), "expected a list of arrays .* got int"),
    "no BOS": (
        lambda c: c["valid"]["tgt"].__setitem__(1, [4, 3]),
        r"valid tgt: sample 1: expected \[2, .* got \[4, 3\]",
    ),
    "no EOS": (lambda c: c["valid"]["tgt"].__setitem__(1, [2, 4]), "sample 1: expected"),
    "special id": (lambda c: c["valid"]["tgt"].__setitem__(1, [2, 1, 3]), "sample 1: expected"),
    "label twice": (lambda c: c["valid"]["tgt"].__setitem__(1, [2, 5, 5, 3]), "distinct ids"),
    "tgt dtype": (
        lambda c: c["valid"]["tgt"].__setitem__(1, [2.0, 3.0]),
        "sample 1: expected a list of integers",
    ),
    "tgt empty": (lambda c: c["valid"].update(tgt=[]), "valid tgt: expected a non-empty list"),
    "no label": (lambda c: [c[s].update(tgt=[[2, 3]] * n) for s, n in SIZES.items()], "at least one label"),
    "section": (lambda c: c.update(test=[1]), "test: expected a dict; got list"),
    "id beyond dict": (
        lambda c: c.update(dict={"a": 4}),
        r"train tgt: sample 0: expected ids below 5 \(1 labels\); got 9",
    ),
    "dict with gaps": (
        lambda c: c.update(dict={"a": 4, "b": 6}),
        r"dict: expected label ids 4, 5, ...; got \[4, 6\]",
    ),
    "dict of another kind": (lambda c: c.update(dict=[1]), "dict: expected a mapping"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused(tmp_path, case):
    content = _content()
    damage, message = WRONG[case]
    damage(content)
    with pytest.raises(DataError, match=message):
        _load(tmp_path, content)


def test_a_file_of_something_else_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected a dict of train, valid, test; got ndarray"):
        _load(tmp_path, torch.zeros(3))
