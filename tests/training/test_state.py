"""The state of a training comes back as it was; one that is damaged, of another one or lacks something is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from small_training import MODEL, Silent, StopAt, run_config, small_data, small_model, train
from torch import nn

from mmer_fast.training.checkpoint import CheckpointError, SavedState, read_tensors, write_tensors
from mmer_fast.training.files import PREVIOUS_FILE, STATE_FILE
from mmer_fast.training.state import (
    Progress,
    load_optimizer_tensors,
    optimizer_tensors,
    random_states,
    restore_random_states,
    section,
    with_prefix,
)
from mmer_fast.training.trainer import Trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished training, not to be written to."""
    directory = tmp_path_factory.mktemp("finished")
    train(directory, Silent())
    return directory


def new_trainer(directory: Path) -> Trainer:
    data = small_data()
    return Trainer(small_model(data, MODEL), run_config(data).train, data, directory, {}, Silent())


def test_a_state_comes_back_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, StopAt(3))
    tensors, header = read_tensors(tmp_path / STATE_FILE)
    state = new_trainer(tmp_path).state
    state.restore(SavedState(tmp_path / STATE_FILE, tensors, header))
    assert state.progress == Progress(step=2, gradient_ratios=header["gradient_ratios"])
    restored = state.tensors()
    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in tensors.items())


def test_the_next_epoch_begins_with_nothing_but_the_history(tmp_path: Path) -> None:
    state = new_trainer(tmp_path).state
    state.progress = Progress(1, 4, [{"epoch": 1}], [0.5], best_epoch=1)
    state.sums.losses += 1
    state.sums.counts += 1
    state.end_epoch()
    assert state.progress == Progress(2, 0, [{"epoch": 1}], [], best_epoch=1)
    assert not state.sums.losses.any()
    assert not state.sums.counts.any()


@pytest.mark.parametrize(
    ("progress", "place"),
    [
        (Progress(2, 3), "step 3 of epoch 3"),
        (Progress(2), "epoch 2"),
        (Progress(0, 1), "step 1 of epoch 1"),
    ],
)
def test_the_place_is_what_was_done_last(progress: Progress, place: str) -> None:
    assert progress.place == place


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_a_damaged_state_is_an_error_that_changes_nothing(tmp_path: Path, finished: Path, size: int) -> None:
    for path in finished.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / PREVIOUS_FILE).unlink()
    state = tmp_path / STATE_FILE
    state.write_bytes(state.read_bytes()[:size])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=STATE_FILE):
        train(tmp_path, Silent())
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_state_whose_best_model_is_missing_is_an_error(tmp_path: Path, finished: Path) -> None:
    shutil.copy(finished / STATE_FILE, tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing: the best model so far"):
        train(tmp_path, Silent())


@pytest.mark.parametrize(
    ("key", "header"),
    [
        ("optimizer/decoder.queries/exp_avg", {}),
        ("random/cpu", {}),
        ("sums/counts", {}),
        (None, None),
        (None, {"epochs": 3}),
    ],
)
def test_a_state_that_lacks_something_is_an_error(
    tmp_path: Path, finished: Path, key: str | None, header: dict | None
) -> None:
    tensors, progress = read_tensors(finished / STATE_FILE)
    if key is not None:
        tensors[key.replace("/", "?")] = tensors.pop(key)
    write_tensors(tmp_path / STATE_FILE, tensors, {**progress, **header} if header is not None else None)
    with pytest.raises(CheckpointError, match=rf"{STATE_FILE} is not a state of this training"):
        train(tmp_path, Silent())


def test_a_state_of_another_model_is_an_error(tmp_path: Path, finished: Path) -> None:
    tensors, header = read_tensors(finished / STATE_FILE)
    del tensors["model/decoder.queries"]
    write_tensors(tmp_path / STATE_FILE, tensors, header)
    with pytest.raises(CheckpointError, match=r"decoder\.queries"):
        new_trainer(tmp_path).resume()


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


def test_a_section_is_what_was_given_its_prefix() -> None:
    tensors = {**with_prefix("a", {"x": torch.tensor(1), "y/z": torch.tensor(2)}), "ab/x": torch.tensor(3)}
    assert section(tensors, "a") == {"x": torch.tensor(1), "y/z": torch.tensor(2)}
