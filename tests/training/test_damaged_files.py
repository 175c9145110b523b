"""Files that a disk or a copy has changed are found, and a run goes on from what is whole, to the same bits."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_training import Silent, StopAt, train

from mmer_fast.training.checkpoint import CheckpointError, read_tensors, write_tensors
from mmer_fast.training.errors import TrainingError
from mmer_fast.training.files import BEST_FILE, PREVIOUS_FILE, STATE_FILE
from mmer_fast.training.run import load_best

RESULTS = ("metrics.json", BEST_FILE, PREVIOUS_FILE, STATE_FILE)
TENSORS = {
    "a/x": torch.arange(6.0).view(2, 3),
    "b": torch.arange(4),
    "c": torch.tensor(0.1, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "is": torch.tensor([True, False]),
}
HEADER = {"epoch": 3, "history": [0.5, None], "name": "é"}


def flip(path: Path, place: float | int, bit: int = 0) -> None:
    """Change one bit: of the byte at a place from 0 to 1 of the file, or at a position."""
    content = bytearray(path.read_bytes())
    content[place if isinstance(place, int) else int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training, not to be written to."""
    directory = tmp_path_factory.mktemp("whole")
    train(directory, Silent())
    return directory


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training stopped in step 2 of epoch 2, not to be written to: its states are those of steps 1 and 0."""
    directory = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        train(directory, StopAt(6))
    return directory


@pytest.fixture
def stopped(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(interrupted, tmp_path / "stopped"))


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, TENSORS, HEADER)
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content)
        flip(path, position, position % 8)
        with pytest.raises(CheckpointError, match=r"file is .*; restore a copy of it, or make it anew$"):
            read_tensors(path)


def test_a_changed_value_is_told_by_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, TENSORS, HEADER)
    flip(path, -1)
    with pytest.raises(
        CheckpointError, match=r"file is damaged: expected contents with the checksum \w{8}, got \w{8};"
    ):
        read_tensors(path)
    with pytest.raises(CheckpointError, match=r"got \w{8}$"):
        read_tensors(path, advice="")


def test_a_file_from_before_there_were_checksums_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file(TENSORS, path, metadata={"header": json.dumps(HEADER)})
    tensors, header = read_tensors(path)
    assert header == HEADER
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_a_run_from_before_there_were_checksums_goes_on(stopped: Path, whole: Path) -> None:
    (stopped / PREVIOUS_FILE).unlink()
    for name in (STATE_FILE, BEST_FILE):
        tensors, header = read_tensors(stopped / name)
        save_file(tensors, stopped / "old", metadata={"header": json.dumps(header)})
        os.replace(stopped / "old", stopped / name)
    train(stopped, Silent())
    for name in (*RESULTS[:1], *RESULTS[2:]):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("place", [0, 0.01, 0.2, 0.6, -1])
def test_a_damaged_state_gives_way_to_the_one_before_it(stopped: Path, whole: Path, place: float) -> None:
    flip(stopped / STATE_FILE, place)
    observer = Silent()
    expected = rf"{STATE_FILE} is .*; going on from the state before it, .*{PREVIOUS_FILE}, after epoch 1$"
    with pytest.warns(UserWarning, match=expected):
        train(stopped, observer)
    assert observer.steps == 4
    assert {name: (stopped / name).read_bytes() for name in RESULTS} == {
        name: (whole / name).read_bytes() for name in RESULTS
    }


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 100)], ids=["missing", "cut"])
def test_so_does_one_that_is_missing_or_cut(stopped: Path, whole: Path, damage: Callable[[Path], Any]) -> None:
    damage(stopped / STATE_FILE)
    with pytest.warns(UserWarning, match=rf"{STATE_FILE} is .*going on from the state before it"):
        train(stopped, Silent())
    assert all((stopped / name).read_bytes() == (whole / name).read_bytes() for name in RESULTS)


def test_the_step_gone_on_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, StopAt(4))
    flip(tmp_path / STATE_FILE, 0.5)
    with pytest.warns(UserWarning, match=r"after step 2 of epoch 1$"):
        train(tmp_path, Silent())


def test_a_damaged_state_takes_the_place_of_no_whole_one(stopped: Path, whole: Path) -> None:
    flip(stopped / STATE_FILE, 0.5)
    before = (stopped / PREVIOUS_FILE).read_bytes()
    with pytest.warns(UserWarning, match="going on"), pytest.raises(KeyboardInterrupt):
        train(stopped, StopAt(2))  # after one checkpoint
    assert (stopped / PREVIOUS_FILE).read_bytes() == before
    assert read_tensors(stopped / STATE_FILE)[1]["step"] == 1
    train(stopped, Silent())
    assert all((stopped / name).read_bytes() == (whole / name).read_bytes() for name in RESULTS)


def test_two_damaged_states_are_an_error_that_names_both_and_changes_nothing(stopped: Path) -> None:
    flip(stopped / STATE_FILE, 0.5)
    os.truncate(stopped / PREVIOUS_FILE, 1000)
    before = contents(stopped)
    with pytest.raises(CheckpointError) as error:
        train(stopped, Silent())
    message = str(error.value)
    assert message.startswith(f"{stopped / STATE_FILE} is damaged: ")
    assert f"; {stopped / PREVIOUS_FILE} is not a readable checkpoint" in message
    assert message.endswith(f"; restore a copy of {STATE_FILE}, or start a new run in another directory")
    assert contents(stopped) == before


def test_a_damaged_state_with_none_before_it_is_an_error_that_says_so(stopped: Path) -> None:
    (stopped / PREVIOUS_FILE).unlink()
    flip(stopped / STATE_FILE, 0.5)
    with pytest.raises(CheckpointError, match=rf"; there is no {PREVIOUS_FILE} to go on from instead; restore a copy"):
        train(stopped, Silent())


@pytest.mark.parametrize("place", [0, 0.01, 0.5, -1])
def test_a_damaged_best_model_is_an_error_before_the_first_step(stopped: Path, place: float) -> None:
    flip(stopped / BEST_FILE, place)
    before, observer = contents(stopped), Silent()
    expected = rf"{BEST_FILE} is .*; it is the best model so far, of epoch 1: restore a copy of it, or start a new run"
    with pytest.raises(CheckpointError, match=expected):
        train(stopped, observer)
    assert observer.steps == 0
    assert contents(stopped) == before


def test_a_best_model_of_another_shape_is_an_error_before_the_first_step(stopped: Path) -> None:
    tensors, header = read_tensors(stopped / BEST_FILE)
    tensors["decoder.queries"] = tensors["decoder.queries"][:-1]
    write_tensors(stopped / BEST_FILE, tensors, header)
    with pytest.raises(
        CheckpointError, match=rf"{BEST_FILE} does not hold this model: decoder\.queries differs; it is"
    ):
        train(stopped, Silent())


def test_a_best_model_that_the_first_epoch_will_replace_may_be_damaged(tmp_path: Path, whole: Path) -> None:
    """As one that was written just before a crash, of which no state speaks yet."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, StopAt(2))
    (tmp_path / BEST_FILE).write_bytes(b"half of it")
    train(tmp_path, Silent())
    assert all((tmp_path / name).read_bytes() == (whole / name).read_bytes() for name in RESULTS)


def test_a_damaged_best_model_is_not_used(tmp_path: Path, whole: Path) -> None:
    shutil.copy(whole / BEST_FILE, tmp_path)
    flip(tmp_path / BEST_FILE, 0.7)
    with pytest.raises(CheckpointError, match=r"is damaged: .*; restore a copy of it, or train again in another"):
        load_best(tmp_path, torch.device("cpu"))


def test_the_states_are_whole_and_different_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after everything that changes the directory, from the second state on."""
    write_tensors(tmp_path / STATE_FILE, TENSORS, 0)
    write_tensors(tmp_path / STATE_FILE, TENSORS, 1, keep_previous_as=tmp_path / PREVIOUS_FILE)
    seen = []

    def look() -> None:
        seen.append(tuple(read_tensors(tmp_path / name)[1] for name in (STATE_FILE, PREVIOUS_FILE)))

    def watched(module: Any, name: str) -> None:
        real = getattr(module, name)

        def between(*arguments: Any, **options: Any) -> Any:
            look()
            try:
                return real(*arguments, **options)
            finally:
                look()

        monkeypatch.setattr(module, name, between)

    for module, name in ((os, "link"), (os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "touch")):
        watched(module, name)
    write_tensors(tmp_path / STATE_FILE, TENSORS, 2, keep_previous_as=tmp_path / PREVIOUS_FILE)
    assert list(dict.fromkeys(seen)) == [(1, 0), (2, 0), (2, 1)]
    assert sorted(contents(tmp_path)) == [PREVIOUS_FILE, STATE_FILE]


def test_a_file_system_without_hard_links_keeps_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", unsupported)
    train(tmp_path, Silent())
    assert contents(tmp_path) == contents(whole)


def test_a_previous_state_that_cannot_be_put_in_its_place(tmp_path: Path) -> None:
    class InTheWay(Silent):
        def on_step(self, *arguments: Any) -> None:
            super().on_step(*arguments)
            (tmp_path / PREVIOUS_FILE).mkdir(exist_ok=True)

    with pytest.raises(TrainingError) as error:
        train(tmp_path, InTheWay())
    expected = f"cannot write {tmp_path / PREVIOUS_FILE}: {os.strerror(errno.EISDIR)}; the state saved before is whole"
    assert str(error.value) == f"{expected}: go on by --resume"
    assert read_tensors(tmp_path / STATE_FILE)[1]["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", PREVIOUS_FILE, STATE_FILE]
