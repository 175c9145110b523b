"""Observers of a training beside the display: several at once, and the log for TensorBoard.

TensorBoard is no dependency: few need it and it brings a web server along. It is imported where it is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mmer_fast.training.algorithm1 import StepResult
from mmer_fast.training.run import RunError
from mmer_fast.training.trainer import Observer


class Observers:
    """Tells several observers."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def on_step(self, epoch: int, step: int, samples: int, result: StepResult) -> None:
        for observer in self.observers:
            observer.on_step(epoch, step, samples, result)

    def on_epoch(self, record: dict[str, Any]) -> None:
        for observer in self.observers:
            observer.on_epoch(record)


def check_tensorboard() -> None:
    """Refuse before training what could not be logged.

    Raises:
        RunError: the package is missing; the message says how to install it.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise RunError("--tensorboard needs the package tensorboard: pip install tensorboard")


class TensorBoardLog:
    """Writes losses by step, and what the history holds by epoch, for TensorBoard; a context manager.

    Steps that a resumed training repeats are written again: they have the same numbers.

    Args:
        directory: for the event files, made with the first of them.
        losses: names of the losses of a step.
        steps: in an epoch.
        every: steps between two that are written; only there the losses are read from the device.

    Raises:
        RunError: the package is missing.
    """

    def __init__(self, directory: Path, losses: Sequence[str], steps: int, every: int) -> None:
        check_tensorboard()
        self.directory, self.losses, self.steps, self.every = directory, losses, steps, every
        self.writer: Any = None

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer is not None:
            self.writer.close()

    def on_step(self, epoch: int, step: int, samples: int, result: StepResult) -> None:
        if step % self.every == 0:
            for name, value in zip(self.losses, result.losses.tolist(), strict=True):
                self._add(f"step/{name}", value, epoch * self.steps + step)

    def on_epoch(self, record: dict[str, Any]) -> None:
        for group, values in (("train", record["train"]), ("valid", record["valid"]), ("epoch", record)):
            for name, value in values.items():
                if isinstance(value, (int, float)) and name not in ("epoch", "samples"):
                    self._add(f"{group}/{name}", value, record["epoch"])
        self.writer.flush()

    def _add(self, name: str, value: float, position: int) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.directory))
        self.writer.add_scalar(name, value, position)
