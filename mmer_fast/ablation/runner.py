"""Trains many runs side by side, each in a worker process.

A worker trains one run after the other. One that dies takes only its run with it: another is started in its place.
Interrupting the parent ends all of them; what they have done is in their checkpoints.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection as connections
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Protocol

import torch

from mmer_fast.ablation.plan import PlannedRun
from mmer_fast.ablation.worker import Done, Task, work
from mmer_fast.training.api import DataSource

STOP_SECONDS = 10.0
"""How long a worker may take to stop before it is killed."""


class RunObserver(Protocol):
    """Who wants to know how the runs go."""

    def on_start(self, run: PlannedRun) -> None:
        """A worker has taken the run."""

    def on_progress(self, run: PlannedRun, share: float) -> None:
        """This share of the run is done, in [0, 1]."""

    def on_end(self, run: PlannedRun, error: str | None) -> None:
        """The run has ended; `error` says why it failed."""


@dataclass(frozen=True)
class Resources:
    """What the runs are trained on.

    Attributes:
        devices: each job has one; more jobs than devices share them.
        jobs: runs at the same time.
        threads: of torch in each, on the CPU.
    """

    devices: tuple[str, ...]
    jobs: int
    threads: int


def resources(device: torch.device, jobs: int | None, runs: int) -> Resources:
    """Share out this machine.

    Args:
        device: to train on; "cuda" without an index stands for all CUDA devices.
        jobs: runs at the same time; None: one a CPU core, or one a CUDA device.
        runs: how many there are in all.
    """
    devices = (str(device),)
    if device.type == "cuda" and device.index is None:
        devices = tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    cores = len(os.sched_getaffinity(0))
    if jobs is None:
        jobs = len(devices) if device.type == "cuda" else cores
    jobs = max(1, min(jobs, runs))
    return Resources(devices, jobs, max(1, min(cores // jobs, torch.get_num_threads())))


def train_all(
    runs: Sequence[PlannedRun], source: DataSource, resources: Resources, observer: RunObserver
) -> dict[Path, str]:
    """Train runs, or go on with them; returns the directories of those that failed, and why.

    Args:
        runs: in the order in which they are begun.
        source: data with the modalities of all runs; a path is read by every worker.
        resources: to train on.
        observer: told about every run.

    Raises:
        KeyboardInterrupt: after all workers have stopped.
    """
    waiting = deque(runs)
    slots: list[_Slot] = [
        _Slot(source, resources.devices[i % len(resources.devices)], resources.threads) for i in range(resources.jobs)
    ]
    failed: dict[Path, str] = {}
    try:
        while True:
            for slot in slots:
                if slot.run is None and waiting:
                    observer.on_start(waiting[0])
                    slot.give(waiting.popleft())
            busy = {slot.connection: slot for slot in slots if slot.run is not None}
            if not busy:
                return failed
            for ready in connections.wait(list(busy)):
                _hear(busy[ready], observer, failed)  # type: ignore[index]
    finally:
        for slot in slots:
            slot.stop()
        for slot in slots:
            slot.join()


class _Slot:
    """A place for a worker process, and the run that it has now."""

    def __init__(self, source: DataSource, device: str, threads: int) -> None:
        self.source, self.device, self.threads = source, device, threads
        self.run: PlannedRun | None = None
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: connections.Connection

    def give(self, run: PlannedRun) -> None:
        self.run = run
        if self.process is None:
            self._start()
        with suppress(BrokenPipeError):  # the worker has died: the end of its pipe says so when it is read
            self.connection.send(Task(run.config, run.directory, self.device))

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, self.source, self.threads), daemon=True)
        with _interrupts_blocked():
            process.start()
        self.process = process
        theirs.close()

    def stop(self) -> None:
        """Ask a worker that trains to stop; one that waits has nothing to put away, which would take it seconds."""
        if self.process is None:
            return
        if self.run is None:
            self.process.kill()
        else:
            self.process.terminate()

    def join(self) -> int | None:
        """Wait for the process, kill it if it takes too long; its exit code."""
        if self.process is None:
            return None
        self.process.join(STOP_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        self.connection.close()
        self.process.close()
        self.process = None
        return code


def _hear(slot: _Slot, observer: RunObserver, failed: dict[Path, str]) -> None:
    """Take one message of a worker."""
    run = slot.run
    assert run is not None
    try:
        message = slot.connection.recv()
    except (EOFError, ConnectionResetError):
        message = Done(_death(slot.join()))
    if not isinstance(message, Done):
        observer.on_progress(run, message)
        return
    slot.run = None
    if message.error is not None:
        failed[run.directory] = message.error
    observer.on_end(run, message.error)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was killed by {signal.Signals(-code).name}; is there enough memory?"
    return f"its process ended with exit code {code}"


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: it is for the parent, which then stops them."""
    resource_tracker.ensure_running()  # it would unblock the signal when a process starts it
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
