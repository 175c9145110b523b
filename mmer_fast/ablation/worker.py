"""A process that trains one run after the other, as it is told.

Messages come and go through a pipe. In: a `Task`. Out: a float, the share of the task that is done; then a `Done`. The
end of the pipe is the end of the worker, so that none outlives its parent by more than a step.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from mmer_fast.training.algorithm1 import StepResult
from mmer_fast.training.api import DataSource, open_data
from mmer_fast.training.display import TrainingDisplay
from mmer_fast.training.files import STATE_FILE
from mmer_fast.training.observers import Observers
from mmer_fast.training.order import steps_per_epoch
from mmer_fast.training.run import LOG_FILE, RunConfig, train_run

REPORT_SECONDS = 0.25


@dataclass(frozen=True)
class Task:
    """A run to train, or to go on with, in its directory."""

    config: RunConfig
    directory: Path
    device: str


@dataclass(frozen=True)
class Done:
    """The end of a task; `error` says in one line why it failed, None that it did not."""

    error: str | None = None


class ProgressSender:
    """An observer that sends the share of the training that is done, now and then."""

    def __init__(self, connection: Connection, epochs: int, steps: int) -> None:
        self.connection, self.epochs, self.steps = connection, epochs, steps
        self.sent = time.monotonic()

    def on_step(self, epoch: int, step: int, samples: int, result: StepResult) -> None:
        if time.monotonic() - self.sent >= REPORT_SECONDS:
            self._send(epoch + (step + 1) / self.steps)

    def on_epoch(self, record: dict[str, Any]) -> None:
        self._send(record["epoch"])

    def _send(self, epochs: float) -> None:
        self.connection.send(epochs / self.epochs)
        self.sent = time.monotonic()


def work(connection: Connection, source: DataSource, threads: int) -> None:
    """Train what comes through a pipe until it is closed.

    Args:
        connection: to the parent.
        source: data with the modalities of every task.
        threads: of torch on the CPU.
    """
    signal.signal(signal.SIGTERM, _exit)  # as an exception, so that no file is left half-written
    torch.set_num_threads(threads)
    data = open_data(source)
    try:
        while True:
            task = connection.recv()
            try:
                _train(task, data.select(list(task.config.data["modalities"])), connection)
                done = Done()
            except (EOFError, BrokenPipeError):
                raise
            except Exception as error:
                done = Done(" ".join(f"{type(error).__name__}: {error}".split()))
            connection.send(done)
    except (EOFError, BrokenPipeError):
        return


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _train(task: Task, data: Any, connection: Connection) -> None:
    config, directory = task.config, task.directory
    directory.mkdir(parents=True, exist_ok=True)
    epochs, kind = config.train.epochs, config.kind
    steps = steps_per_epoch(data.splits["train"], config.train, kind.network.group)
    with TrainingDisplay(Console(quiet=True), directory / LOG_FILE, epochs, steps, kind.losses) as display:
        display.say(f"{data.source}: goes on" if (directory / STATE_FILE).exists() else f"{data.source}: starts")
        sender = ProgressSender(connection, epochs, steps)
        train_run(config, data, directory, torch.device(task.device), Observers([display, sender]))
