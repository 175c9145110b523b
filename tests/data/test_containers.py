from __future__ import annotations

import numpy as np
import pytest

from mmer_fast.data import DataError


def _set(mapping, key, value):
    mapping[key] = value


def _poke(array, index, value):
    array[index] = value


BROKEN = {
    "split missing": (
        lambda d: d.splits.pop("valid"),
        "splits: expected train, valid, test; got train, test",
    ),
    "modality missing": (
        lambda d: d.splits["test"].features.pop("video"),
        "test features: .* text, video; got text",
    ),
    "lengths missing": (
        lambda d: d.splits["test"].lengths.pop("video"),
        "test lengths: .* text, video; got text",
    ),
    "feature size": (
        lambda d: _set(d.splits["valid"].features, "text", np.zeros((3, 6, 4), np.float32)),
        r"valid text: expected \(N, T >= 1, 5\); got shape \(3, 6, 4\)",
    ),
    "sample count": (
        lambda d: _set(d.splits["valid"].features, "text", np.zeros((2, 6, 5), np.float32)),
        "valid text: expected 3 samples, as many as labels; got 2",
    ),
    "feature dtype": (
        lambda d: _set(d.splits["valid"].features, "text", np.zeros((3, 6, 5))),
        "valid text: expected float32 .* got float64",
    ),
    "length above T": (
        lambda d: _poke(d.splits["test"].lengths["text"], 2, 7),
        r"\[0, 6\]; got 7 for sample 2",
    ),
    "length negative": (lambda d: _poke(d.splits["test"].lengths["text"], 1, -1), "got -1 for sample 1"),
    "length dtype": (
        lambda d: _set(d.splits["test"].lengths, "text", np.zeros(4, np.int32)),
        r"test text lengths: expected int64 of shape \(4,\); got int32",
    ),
    "not finite": (
        lambda d: _poke(d.splits["train"].features["text"], (3, 0, 1), np.nan),
        "got 1 others, first in sample 3, step 0",
    ),
    "dirty padding": (
        lambda d: _poke(d.splits["train"].features["text"], (0, 5, 0), 1),
        "zeros past each sample",
    ),
    "label value": (
        lambda d: _poke(d.splits["train"].labels, (0, 0), 2),
        "train labels: expected only 0 and 1; got 2",
    ),
    "label count": (lambda d: d.label_names.append("d"), r"train labels: .*\(N, 4\), .*; got .*\(7, 3\)"),
    "label names twice": (
        lambda d: _set(d.label_names, 0, "b"),
        "label_names: expected one or more distinct",
    ),
    "empty split": (
        lambda d: setattr(d.splits["valid"], "labels", np.zeros((0, 3), np.uint8)),
        "valid labels: expected at least one sample",
    ),
    "no modality": (lambda d: d.modalities.clear(), "modalities: expected at least one"),
    "extras rows": (
        lambda d: _set(d.splits["test"].extras, "x", np.zeros(3)),
        "test extras x: expected 4 rows",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_check_names_what_is_inconsistent(make_small, case):
    data = make_small()
    damage, message = BROKEN[case]
    damage(data)
    with pytest.raises(DataError, match=message):
        data.check()


def test_select_keeps_the_given_order(make_small):
    data = make_small()
    chosen = data.select(["video", "text"]).check()
    assert chosen.modalities == {"video": 3, "text": 5}
    assert list(chosen.modalities) == list(chosen.splits["test"].features) == ["video", "text"]
    assert list(data.select(["video"]).check().splits["train"].lengths) == ["video"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["smell"], "'smell' not in made for a test; available: text, video"),
        ([], "got none"),
        (["text"] * 2, "each name once"),
        ("text", "expected a list of names; got the text 'text'"),
    ],
)
def test_select_refuses(make_small, names, message):
    with pytest.raises(DataError, match=message):
        make_small().select(names)
