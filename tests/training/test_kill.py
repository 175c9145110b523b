"""kill -9 at any moment: no more than the steps since the last checkpoint is lost, and the result is the same bits."""

from __future__ import annotations

import mmap
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from child_process import runs, start, wait
from small_training import Silent, small_data, train

from mmer_fast.training import checkpoint
from mmer_fast.training.checkpoint import read_tensors

EVERY, STEPS = 2, 8
FILES = ("config.json", "metrics.json", "model.safetensors", "state.safetensors")
STATES = ("state.safetensors", "state.previous.safetensors")


class Counter(Silent):
    """Counts steps where the process that started this one can see them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = mmap.mmap(-1, 1)

    def on_step(self, *_: Any) -> None:
        self.shared[0] += 1

    def count(self) -> int:
        return self.shared[0]


def start_training(directory: Path, counter: Counter, before: Callable[[], None] = lambda: None) -> int:
    def work() -> None:
        before()
        train(directory, counter, checkpoint_every=EVERY)

    return start(work)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nobody disturbed."""
    small_data()  # so that no process has to wait for what is imported or cached at the first use
    directory = tmp_path_factory.mktemp("whole")
    assert wait(start_training(directory, Counter())) == 0
    return directory


def check_resumption(directory: Path, whole: Path, done: int) -> None:
    """Resume what was killed after `done` steps and compare the files with those of an undisturbed training."""
    directory.mkdir(exist_ok=True)
    counter = Counter()
    assert wait(start_training(directory, counter)) == 0
    assert counter.count() <= STEPS - done + EVERY
    assert sorted(path.name for path in directory.iterdir()) == sorted({*FILES, *STATES})
    for name in FILES:
        assert (directory / name).read_bytes() == (whole / name).read_bytes(), name
    read_tensors(directory / STATES[1])


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in(module: Any, name: str, call: int, moment: str) -> None:
    """From now on the process kills itself around a call of a function: before, after, or halfway through a file."""
    real, calls = getattr(module, name), 0

    def deadly(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call and moment == "before":
            kill_myself()
        real(*arguments, **options)
        if calls == call and moment == "halfway":
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        if calls == call:
            kill_myself()

    setattr(module, name, deadly)


# Files in the order in which they are written: config, the state at step 2, then at step 4 the state, the best
# model and the state again, and so on; config is no tensor file. From step 4 on, the state of before is given a second
# name by `link` before a state is written, and moved to its place by `replace` after that.
@pytest.mark.parametrize(
    ("module", "name", "call", "moment"),
    [
        (checkpoint, "save_file", 1, "halfway"),
        (checkpoint, "save_file", 3, "halfway"),
        (checkpoint, "save_file", 4, "halfway"),
        (os, "fsync", 4, "before"),
        (os, "fsync", 6, "after"),
        (os, "replace", 1, "before"),
        (os, "replace", 3, "before"),
        (os, "replace", 4, "before"),
        (os, "replace", 4, "after"),
        (os, "replace", 5, "after"),
        (os, "replace", 6, "after"),
        (os, "replace", 7, "after"),
        (os, "link", 1, "before"),
        (os, "link", 1, "after"),
        (os, "link", 2, "after"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_killed_while_a_file_is_written(
    tmp_path: Path, whole: Path, module: Any, name: str, call: int, moment: str
) -> None:
    counter = Counter()
    killed = start_training(tmp_path, counter, lambda: dies_in(module, name, call, moment))
    assert wait(killed) == -signal.SIGKILL
    check_resumption(tmp_path, whole, counter.count())


@pytest.mark.parametrize(("call", "moment"), [(2, "before"), (2, "after"), (3, "after"), (4, "before")])
def test_killed_after_going_on_from_the_state_before_a_damaged_one(
    tmp_path: Path, whole: Path, call: int, moment: str
) -> None:
    """The damaged state takes the place of no whole one, whenever the process dies; `replace` 1 is that of config."""
    stopped = start_training(tmp_path, Counter(), lambda: dies_in(os, "replace", 4, "after"))
    assert wait(stopped) == -signal.SIGKILL
    state = tmp_path / STATES[0]
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)

    def before() -> None:
        warnings.simplefilter("ignore")
        dies_in(os, "replace", call, moment)

    assert wait(start_training(tmp_path, Counter(), before)) == -signal.SIGKILL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_resumption(tmp_path, whole, 0)


def test_killed_at_any_time_again_and_again(tmp_path: Path, whole: Path) -> None:
    draw, deaths = random.Random(), 0
    for _ in range(4):
        counter, steps = Counter(), draw.randint(1, 3)
        pid = start_training(tmp_path, counter)
        while counter.count() < steps and runs(pid):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        deaths += wait(pid) == -signal.SIGKILL
    assert deaths > 0
    check_resumption(tmp_path, whole, 0)
