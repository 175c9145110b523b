"""Two trainings in one directory: the second is refused, until the first has ended in whatever way."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
from child_process import start, wait
from small_training import Silent, train

from mmer_fast.training import lock
from mmer_fast.training.lock import locked
from mmer_fast.training.run import RunError


class Stuck(Silent):
    """Says that it is in the first step, and stays there."""

    def __init__(self, said: Path) -> None:
        super().__init__()
        self.said = said

    def on_step(self, *_: Any) -> None:
        self.said.touch()
        time.sleep(600)


def stuck_training(directory: Path, **changes: Any) -> int:
    """The number of a process that is in the first step of a training."""
    said = directory.with_name("said")
    pid = start(lambda: train(directory, Stuck(said), **changes))
    deadline = time.monotonic() + 60
    while not said.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return pid


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_training_is_refused_until_the_first_is_killed(tmp_path: Path, workers: int) -> None:
    """At once, although workers notice only after seconds that the training that they worked for is gone."""
    directory = tmp_path / "run"
    pid = stuck_training(directory, workers=workers)
    before = contents(directory)
    observer = Silent()
    with pytest.raises(RunError, match=r"run: another process trains there; wait for its end, or choose another dir"):
        train(directory, observer)
    assert observer.steps == 0
    assert contents(directory) == before
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    assert train(directory, Silent()) == train(tmp_path / "whole", Silent())


def test_a_training_that_has_ended_or_failed_holds_nothing(tmp_path: Path) -> None:
    class Fails(Silent):
        def on_step(self, *_: Any) -> NoReturn:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tmp_path, Fails())
    train(tmp_path, Silent())
    with locked(tmp_path) as alone:
        assert alone
    assert not lock._held


def test_a_directory_is_held_once_in_a_process_too(tmp_path: Path) -> None:
    with locked(tmp_path) as alone, locked(tmp_path) as again:
        assert (alone, again) == (True, False)


def test_a_file_system_without_locks_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> NoReturn:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with locked(tmp_path) as alone:
        assert alone
