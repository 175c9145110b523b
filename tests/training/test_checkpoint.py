"""Atomic files, and reading without executing."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from mmer_fast._files import write_atomically
from mmer_fast.training.checkpoint import (
    CheckpointError,
    load_optimizer_tensors,
    optimizer_tensors,
    random_states,
    read_json,
    read_tensors,
    restore_random_states,
    section,
    with_prefix,
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


def test_the_optimizer_state_comes_back(tmp_path: Path) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    first = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(first.parameters(), lr=0.1, fused=True)
    step(first, optimizer)
    write_tensors(tmp_path / "state", optimizer_tensors(optimizer, first), None)

    second = nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    resumed = torch.optim.AdamW(second.parameters(), lr=0.1, fused=True)
    load_optimizer_tensors(resumed, second, read_tensors(tmp_path / "state")[0])
    step(first, optimizer)
    step(second, resumed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_random_states_come_back() -> None:
    states = random_states()
    first = torch.randn(5)
    torch.randn(7)
    restore_random_states(states)
    assert torch.equal(first, torch.randn(5))


def test_sections() -> None:
    tensors = {**with_prefix("a", {"x": torch.tensor(1), "y/z": torch.tensor(2)}), "ab/x": torch.tensor(3)}
    assert section(tensors, "a") == {"x": torch.tensor(1), "y/z": torch.tensor(2)}
