"""What a user sees while runs are trained: bars on a terminal, elsewhere a line at start and end of each run."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mmer_fast.ablation.plan import PlannedRun


class AblationDisplay:
    """Observer of `train_all` for a console; a context manager.

    Args:
        console: where to show progress.
        runs: how many will be trained.
    """

    def __init__(self, console: Console, runs: int) -> None:
        self.console, self.runs = console, runs
        self.ended = 0
        self.started: dict[PlannedRun, float] = {}
        self.shares: dict[PlannedRun, float] = {}
        self.tasks: dict[PlannedRun, TaskID] = {}
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=console,
                transient=True,
            )
            self.total = self.bar.add_task("", total=runs)

    def __enter__(self) -> AblationDisplay:
        if self.bar is not None:
            self.bar.start()
            self._show_total()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, line: str) -> None:
        """A line above the bars."""
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def on_start(self, run: PlannedRun) -> None:
        self.started[run] = time.monotonic()
        if self.bar is not None:
            self.tasks[run] = self.bar.add_task(run.label, total=1.0)
        else:
            self.say(f"{'goes on' if run.state == 'begun' else 'starts'}: {run.label}")

    def on_progress(self, run: PlannedRun, share: float) -> None:
        self.shares[run] = share
        if self.bar is not None:
            self.bar.update(self.tasks[run], completed=share)
            self._show_total()

    def on_end(self, run: PlannedRun, error: str | None) -> None:
        self.ended += 1
        self.shares.pop(run, None)
        seconds = time.monotonic() - self.started[run]
        outcome = f"failed: {error}" if error else "finished"
        self.say(f"{self.ended}/{self.runs} {run.label}: {outcome} ({seconds:.0f} s)")
        if self.bar is not None:
            self.bar.remove_task(self.tasks.pop(run))
            self._show_total()

    def _show_total(self) -> None:
        assert self.bar is not None
        done = self.ended + sum(self.shares.values())
        self.bar.update(self.total, completed=done, description=f"{self.ended} of {self.runs} runs")
