from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmer_fast.data import DataError, load
from mmer_fast.data.safetensors_file import write_safetensors


def test_round_trip_keeps_names_order_and_extras(make_small, tmp_path):
    data = make_small()
    data = data.select(["video", "text"])  # not the order in which the file sorts its tensors
    data.splits["test"].extras |= {"shift": np.array([0, 1, 2, 0], np.uint8), "id": np.array(["a", "é,\n", "", "d"])}
    data.splits["test"].extras["speaker"] = np.array([b"x", b"y", b"x", b"x"])
    write_safetensors(data, tmp_path / "d.safetensors")
    back = load(tmp_path / "d.safetensors")
    assert list(back.modalities) == ["video", "text"]
    assert back.label_names == data.label_names
    assert back.notes == []
    assert back.splits["test"].extras["shift"].tolist() == [0, 1, 2, 0]
    assert back.splits["test"].extras["id"].tolist() == ["a", "é,\n", "", "d"]
    assert back.splits["test"].extras["speaker"].tolist() == ["x", "y", "x", "x"]
    assert set(back.splits["train"].extras) == set(data.splits["train"].extras)


def test_a_file_without_metadata(make_small, tmp_path):
    write_safetensors(make_small(), tmp_path / "d.safetensors")
    arrays = load_file(tmp_path / "d.safetensors")
    save_file({k: v for k, v in arrays.items() if not k.endswith("_lengths")}, tmp_path / "bare.safetensors")
    back = load(tmp_path / "bare.safetensors")
    assert back.label_names == ["label_0", "label_1", "label_2"]
    assert "text: lengths derived from all-zero rows" in back.notes


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"label_names": "a, b"}, "metadata label_names: expected a JSON list of strings; got 'a, b'"),
        ({"modalities": json.dumps(["text", "smell"])}, "metadata modalities: there is no array train_smell"),
        ({"test_extras_id": json.dumps([1, 2])}, "metadata test_extras_id: expected a JSON list of strings; got"),
        ({"test_extras_id": json.dumps(["a"])}, r"test extras id: expected \d+ rows of plain values; got .*\(1,\)"),
        ({"label_names": json.dumps(["a"])}, r"train labels: .*\(N, 1\)"),
    ],
)
def test_wrong_metadata_is_refused(make_small, tmp_path, metadata, message):
    write_safetensors(make_small(), tmp_path / "d.safetensors")
    save_file(load_file(tmp_path / "d.safetensors"), tmp_path / "d.safetensors", metadata)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "d.safetensors")


def test_wrong_files_are_refused(make_small, tmp_path):
    write_safetensors(make_small(), tmp_path / "d.safetensors")
    whole = (tmp_path / "d.safetensors").read_bytes()
    for content in (b"", b"noise", whole[:-10]):
        (tmp_path / "cut.safetensors").write_bytes(content)
        with pytest.raises(DataError, match=r"cut\.safetensors: not a readable \.safetensors file"):
            load(tmp_path / "cut.safetensors")
    save_file({"weight": np.ones((2, 2))}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="unknown key weight"):
        load(tmp_path / "model.safetensors")
