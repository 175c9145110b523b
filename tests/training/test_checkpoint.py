"""Atomic files, and reading without executing."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch

from mmer_fast._files import write_atomically
from mmer_fast.training.checkpoint import (
    CheckpointError,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)


def test_tensors_and_header_come_back(tmp_path: Path) -> None:
    tensors = {"a/x": torch.randn(3, 2), "b": torch.arange(4), "c": torch.tensor(0.1, dtype=torch.float64)}
    header = {"history": [0.1, 1e-300, None], "name": "é"}
    write_tensors(tmp_path / "file", tensors, header)
    back, read_header = read_tensors(tmp_path / "file")
    assert read_header == header
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"value": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"value": math.nan})

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert read_json(path) == {"value": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["value.json"]


def test_files_have_the_permissions_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    write_tensors(tmp_path / "weights", {"a": torch.ones(1)}, {})
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return Path.touch, (str(tmp_path / "executed"),)

    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_tensors(path)
    assert not (tmp_path / "executed").exists()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing"):
        read_tensors(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="nothing"):
        read_json(tmp_path / "nothing")
