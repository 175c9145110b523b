"""What a user sees of a training: a progress bar on a terminal, one plain line an epoch elsewhere, and a log
file.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmer_fast.training.algorithm1 import LOSSES, StepResult

METRICS = {
    "accuracy": "Accuracy",
    "hamming_loss": "Hamming loss",
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
}
SYMBOLS = {"recognition": "L_r", "masked": "L_m", "perturbed": "L_p"}
REFRESH_SECONDS = 0.25


class _LogFile(logging.FileHandler):
    """A log that a full disk cuts short, without a traceback for every line: it is no reason to stop training."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class TrainingDisplay:
    """Observer of a training for a console and a log file; a context manager around `train_run`.

    Args:
        console: where to show progress.
        log_file: gets one line an epoch, appended.
        epochs, steps: epochs of the training, and steps in each.
        losses: names of the losses of a step.
    """

    def __init__(
        self, console: Console, log_file: Path, epochs: int, steps: int, losses: Sequence[str] = LOSSES
    ) -> None:
        self.console = console
        self.epochs, self.steps, self.losses = epochs, steps, losses
        self.log = logging.Logger("mmer_fast.train", logging.INFO)
        self.handler = _LogFile(log_file, encoding="utf-8", errors="backslashreplace")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.log.addHandler(self.handler)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.epoch_samples = self.bar_samples = 0
        self.epoch_start = self.bar_start = self.shown = time.monotonic()

    def __enter__(self) -> TrainingDisplay:
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("epoch {task.fields[epoch]}/" + str(self.epochs)),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.task = self.bar.add_task("", total=self.epochs * self.steps, epoch=1, status="")
            self.bar.start()
        self.epoch_start = self.bar_start = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if error is not None:
            self.log.info("stopped: %s", str(error) or type(error).__name__)
        with suppress(OSError):  # a full disk is reported where a checkpoint fails
            self.handler.close()

    def say(self, line: str) -> None:
        """A line for both the console and the log."""
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)
        self.log.info("%s", line)

    def on_step(self, epoch: int, step: int, samples: int, result: StepResult) -> None:
        self.epoch_samples += samples
        self.bar_samples += samples
        now = time.monotonic()
        if self.bar is None or now - self.shown < REFRESH_SECONDS:
            return
        self.shown = now
        rate = self.bar_samples / (now - self.bar_start)
        losses = dict(zip(self.losses, result.losses.tolist(), strict=True))
        status = f"{_shown(losses, 3)}  {rate:.0f} samples/s"
        self.bar.update(self.task, completed=epoch * self.steps + step + 1, epoch=epoch + 1, status=status)

    def on_epoch(self, record: Mapping[str, Any]) -> None:
        now = time.monotonic()
        seconds = now - self.epoch_start
        train, valid, ratio = record["train"], record["valid"], record["gradient_ratio"]
        parts = [
            f"epoch {record['epoch']}/{self.epochs}",
            _shown({name: train[name] for name in self.losses}, 4),
            *([f"|dL_p|/|d(L_r+rho L_m)| {ratio:.2g}"] if ratio is not None else []),
            f"micro-F1 train {train['micro_f1']:.4f} valid {valid['micro_f1']:.4f}",
            f"{self.epoch_samples / seconds:.0f} samples/s  {seconds:.1f} s",
        ]
        self.say("  ".join(parts))
        self.epoch_samples, self.epoch_start = 0, now


def _shown(losses: Mapping[str, float], digits: int) -> str:
    """Losses in one line, those of RobMMR by the paper's symbols."""
    symbols = SYMBOLS if set(losses) == set(SYMBOLS) else {}
    parts = []
    for name, value in losses.items():
        form = ".2e" if name == "perturbed" else f".{digits}f"
        parts.append(f"{symbols.get(name, name)} {value:{form}}")
    return "  ".join(parts)


def metrics_table(
    results: Mapping[str, Mapping[str, Any]], title: str, shift_names: Mapping[str, str] | None = None
) -> Table:
    """The paper's four metrics as a table.

    Args:
        results: row name → metrics, as from `evaluate`; its "shift" entries become rows of their own.
        shift_names: what to call them; by default "shift" and the value.
    """
    table = Table(title=title)
    table.add_column("split", no_wrap=True)
    table.add_column("samples", justify="right")
    for heading in METRICS.values():
        table.add_column(heading, justify="right")
    for name, metrics in results.items():
        rows = {name: metrics}
        for value, subset in metrics.get("shift", {}).items():
            rows[f"  {(shift_names or {}).get(value, f'shift {value}')}"] = subset
        for label, values in rows.items():
            table.add_row(label, str(values["samples"]), *(f"{values[key]:.4f}" for key in METRICS))
    return table


def conditions_table(columns: Mapping[str, Mapping[str, float]], titles: Mapping[str, str], title: str) -> Table:
    """Metrics by the modalities that are available.

    Args:
        columns: condition → metrics, as from `ConditionTable.columns`.
        titles: metric → what to call it.
    """
    table = Table(title=title)
    table.add_column("available")
    for heading in titles.values():
        table.add_column(heading, justify="right")
    for condition, metrics in columns.items():
        table.add_row(condition, *(f"{metrics[key]:.4f}" for key in titles))
    return table


def recall_lines(recalls: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One line a modality: how often the masks cover planted units."""
    return [
        f"mask recall of planted units, {name}: {values['recall']:.3f} (chance {values['chance']:.3f})"
        for name, values in recalls.items()
    ]
