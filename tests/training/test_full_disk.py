"""Writes that fail: one line that names file and cause, the state of before whole, nothing half-written."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from child_process import start, wait
from rich.console import Console
from safetensors import SafetensorError
from small_training import Silent, train

from mmer_fast import _files
from mmer_fast._files import WriteError, remove_partial_files, write_atomically
from mmer_fast.training import checkpoint
from mmer_fast.training.checkpoint import read_tensors, write_tensors
from mmer_fast.training.display import TrainingDisplay
from mmer_fast.training.errors import TrainingError
from mmer_fast.training.files import PREVIOUS_FILE, STATE_FILE

NO_SPACE = os.strerror(errno.ENOSPC)


class At(Silent):
    """Calls something after a number of steps, before the checkpoint of that step."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        super().__init__()
        self.step, self.action = step, action

    def on_step(self, *arguments: Any) -> None:
        super().on_step(*arguments)
        if self.steps == self.step:
            self.action()


def fails(directory: Path, step: int, action: Callable[[], Any]) -> str:
    """The line with which training ends when `action` is called after a step."""
    with pytest.raises(TrainingError) as error:
        train(directory, At(step, action))
    assert "\n" not in str(error.value)
    return str(error.value)


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, NO_SPACE)


def no_space_by_safetensors(_: Any, partial: Path, **__: Any) -> None:
    partial.write_bytes(b"half of it")
    raise SafetensorError(f"Error while serializing: I/O error: {NO_SPACE} (os error {errno.ENOSPC})")


@pytest.mark.parametrize(
    ("module", "name", "failure"),
    [
        (checkpoint, "save_file", no_space_by_safetensors),
        (os, "fsync", no_space),
        (os, "replace", no_space),
    ],
    ids=["write", "fsync", "replace"],
)
def test_a_full_disk_stops_training_and_the_state_of_before_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, failure: Any
) -> None:
    message = fails(tmp_path / "full", 6, lambda: monkeypatch.setattr(module, name, failure))
    path = tmp_path / "full" / STATE_FILE
    assert message == f"cannot write {path}: {NO_SPACE}; the state saved before is whole: go on by --resume"
    names = {"config.json", "model.safetensors", PREVIOUS_FILE, STATE_FILE}
    assert {file.name for file in path.parent.iterdir()} == names
    progress = read_tensors(path)[1]
    assert (progress["epoch"], progress["step"]) == (1, 1)
    monkeypatch.undo()
    observer = Silent()
    assert train(tmp_path / "full", observer) == train(tmp_path / "whole", Silent())
    assert observer.steps == 3


def test_a_full_disk_before_the_first_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = fails(tmp_path, 1, lambda: monkeypatch.setattr(os, "fsync", no_space))
    assert message == f"cannot write {tmp_path / STATE_FILE}: {NO_SPACE}; no state was saved before"


def test_a_directory_that_is_deleted_under_way(tmp_path: Path) -> None:
    directory = tmp_path / "gone"
    message = fails(directory, 3, lambda: shutil.rmtree(directory))
    assert message == f"cannot write {directory / STATE_FILE}: No such file or directory; no state was saved before"
    assert not directory.exists()


def test_a_file_that_grows_over_the_limit_of_the_process(tmp_path: Path) -> None:
    """The real thing: the operating system refuses to write on."""
    directory, said = tmp_path / "run", tmp_path / "said"

    def work() -> None:
        said.write_text(fails(directory, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))))

    assert wait(start(work)) == 0
    path = directory / STATE_FILE
    expected = f"cannot write {path}: {os.strerror(errno.EFBIG)}; the state saved before is whole: go on by --resume"
    assert said.read_text() == expected
    assert {file.name for file in directory.iterdir()} == {"config.json", PREVIOUS_FILE, STATE_FILE}
    assert read_tensors(path)[1]["step"] == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_becomes_read_only(tmp_path: Path) -> None:
    try:
        message = fails(tmp_path / "run", 3, lambda: (tmp_path / "run").chmod(0o500))
    finally:
        (tmp_path / "run").chmod(0o700)
    assert f"cannot write {tmp_path / 'run' / STATE_FILE}: Permission denied" in message


def test_a_write_error_names_the_file_that_was_to_be_and_not_the_partial_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)  # as on a file system that is mounted read-only
    with pytest.raises(WriteError) as error:
        write_atomically(tmp_path / "value", lambda partial: None)
    assert str(error.value) == f"cannot write {tmp_path / 'value'}: Read-only file system"
    assert error.value.errno == errno.EROFS


def test_an_error_of_safetensors_without_a_number_keeps_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise SafetensorError("something else")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(WriteError, match=r"cannot write .*weights: something else$"):
        write_tensors(tmp_path / "weights", {"a": torch.ones(1)}, {})
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    mine = {"mine", ".tmp-notes", ".tmpAb3xYz9"}
    for name in (f"{_files.PARTIAL}model.safetensors", ".tmpAb3xYz", *mine):
        (tmp_path / name).write_text("half")
    (tmp_path / f"{_files.PARTIAL}folder").mkdir()
    remove_partial_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*mine, f"{_files.PARTIAL}folder"}
    left = tmp_path / "run" / f"{_files.PARTIAL}failed.safetensors"
    left.parent.mkdir()
    left.write_text("half")
    train(left.parent, Silent(), epochs=1)
    assert not left.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_does_not_stop_training(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    with TrainingDisplay(Console(file=out), Path("/dev/full"), epochs=1, steps=1) as display:
        display.say("a line")
    assert out.getvalue() == "a line\n"
    assert capsys.readouterr().err == ""
