"""Training batches, cut in this process or in worker processes that run ahead of it.

Workers are forked, so they read the arrays of the split where they lie, memory-mapped files included: nothing is copied
or pickled on the way there. Batches come back through shared memory, in order, and draw no random numbers: training has
the same bits with any number of workers.

Evaluation has no workers, with which it takes longer: a batch is cut out of memory in less time than it is fetched from
another process, and all batches of a small split in less than it takes to start one.
"""

from __future__ import annotations

import multiprocessing
import re
import signal
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmer_fast.data import Batch, SequenceDataset, Split, collate
from mmer_fast.training.errors import TrainingError
from mmer_fast.training.order import batches


def training_batches(
    split: Split, indices: Sequence[Tensor], device: torch.device, workers: int, extras: Sequence[str] = ()
) -> Generator[Batch]:
    """The batches of a split with these sample indices, on `device`; to be closed where it is not used up.

    Args:
        split: a validated split.
        indices: of the samples of each batch.
        device: where the batches go; to a CUDA device through page-locked memory where there are workers.
        workers: processes, each of which prepares up to two batches ahead, at most one for each batch after the first;
            0: this one, each batch when asked for. A daemonic process, which may have no children, does so too.
        extras: names of the extras that batches have.
    """
    workers = min(workers, len(indices) - 1)
    if workers <= 0 or multiprocessing.current_process().daemon:
        return batches(split, indices, device, extras)
    return _batches_of_workers(SequenceDataset(split, extras), indices, device, workers)


@contextmanager
def dead_workers_named(workers: int) -> Iterator[None]:
    """Around the use of `training_batches`: turns the death of a worker, which torch reports from a signal handler and
    so at any place, into a `TrainingError`.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.match(r"DataLoader worker \(pid", str(error)):
            raise
        cause = str(error).splitlines()[0].strip().rstrip(".")
        raise TrainingError(
            f"a process that loads data died: {cause}; most often memory or /dev/shm is full: go on by --resume with "
            f"fewer workers (now {workers}; 0 needs no such process)"
        ) from None


def _batches_of_workers(
    dataset: SequenceDataset, indices: Sequence[Tensor], device: torch.device, workers: int
) -> Generator[Batch]:
    loader = DataLoader(
        dataset,
        batch_sampler=[chunk.tolist() for chunk in indices],
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork",
        generator=torch.Generator(),  # the seed of the workers is not drawn from training's generator
    )
    prepared = _started(loader)
    try:
        for batch in prepared:
            yield batch.to(device, non_blocking=True)
    finally:  # not left to the last reference: workers block SIGTERM, by which Python would end them at exit
        prepared._shutdown_workers()


def _started(loader: DataLoader[Batch]) -> Any:
    """The iterator of a loader, with its workers: all or none."""
    others = multiprocessing.active_children()
    try:
        with _sigterm_blocked(), warnings.catch_warnings():
            # Python 3.12 warns of threads; the workers only index arrays.
            warnings.filterwarnings("ignore", r".*use of fork\(\) may lead to deadlocks", DeprecationWarning)
            return iter(loader)
    except OSError as error:  # no memory for one more process, too many of them, or too many open files
        for worker in multiprocessing.active_children():
            if worker not in others:  # it blocks the SIGTERM by which Python ends it at exit, which would wait for it
                worker.kill()
                worker.join()
        cause = error.strerror or str(error)
        raise TrainingError(
            f"a process that loads data cannot be started: {cause}; go on by --resume with fewer workers (now "
            f"{loader.num_workers}; 0 needs no such process)"
        ) from None


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Processes started here never see SIGTERM: a scheduler warns every process of a job, and training, which goes on
    to the end of the step, needs its workers.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
