"""SIGTERM: the state is saved at the next step boundary, and training goes on from there when resumed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from child_process import start, wait
from small_training import Silent, train

from mmer_fast.training.checkpoint import read_tensors
from mmer_fast.training.errors import Terminated
from mmer_fast.training.files import STATE_FILE
from mmer_fast.training.termination import TerminationRequest


class TermAt(Silent):
    """Sends SIGTERM to a process, by default this one, within a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_step(self, *arguments: Any) -> None:
        super().on_step(*arguments)
        if self.steps == self.step:
            self.send()

    def send(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [1, 3, 4])
def test_the_state_is_saved_at_the_boundary_and_resumes_to_the_same_result(tmp_path: Path, step: int) -> None:
    previous = signal.getsignal(signal.SIGTERM)
    observer = TermAt(step)
    with pytest.raises(Terminated) as ended:
        train(tmp_path / "stopped", observer, checkpoint_every=0)
    assert ended.value.code == 143
    assert observer.steps == step
    progress = read_tensors(tmp_path / "stopped" / STATE_FILE)[1]
    assert (progress["epoch"], progress["step"]) == (0, step)
    assert signal.getsignal(signal.SIGTERM) is previous
    rest = Silent()
    whole = train(tmp_path / "whole", Silent(), checkpoint_every=0)
    assert train(tmp_path / "stopped", rest, checkpoint_every=0) == whole
    assert rest.steps == 8 - step


def test_sigterm_between_epochs(tmp_path: Path) -> None:
    class AtTheEnd(TermAt):
        def on_epoch(self, record: dict[str, Any]) -> None:
            super().on_epoch(record)
            self.send()

    observer = AtTheEnd(99)
    with pytest.raises(Terminated):
        train(tmp_path, observer)
    assert observer.steps == 4
    assert read_tensors(tmp_path / STATE_FILE)[1]["epoch"] == 1


def test_a_script_exits_with_143(tmp_path: Path) -> None:
    def work() -> None:
        try:
            train(tmp_path, TermAt(2))
        except SystemExit as ended:
            os._exit(int(ended.code or 0))

    assert wait(start(work)) == 143


def test_the_workers_outlive_the_warning(tmp_path: Path) -> None:
    class TermToWorkers(TermAt):
        sent = 0

        def send(self) -> None:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGTERM)
                self.sent += 1

    observer = TermToWorkers(1)
    assert train(tmp_path / "warned", observer, workers=2) == train(tmp_path / "whole", Silent())
    assert observer.sent >= 2


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    previous = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with TerminationRequest() as request:
            seen.extend([signal.getsignal(signal.SIGTERM), request.received])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [previous, False]
