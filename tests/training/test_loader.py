"""Worker processes: the same batches and bits, nothing copied, and what is said when one dies."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from small_training import Silent, StopAt, run_config, small_data, train

from mmer_fast.data import Batch, SequenceDataset, Split
from mmer_fast.training import loader
from mmer_fast.training.errors import TrainingError
from mmer_fast.training.loader import dead_workers_named, training_batches
from mmer_fast.training.order import epoch_batches
from mmer_fast.training.run import check_same, train_run

CPU = torch.device("cpu")
FILES = ("metrics.json", "model.safetensors", "state.safetensors")


def test_training_has_the_same_bits_with_any_number_of_workers(tmp_path: Path) -> None:
    results = [train(tmp_path / str(workers), Silent(), workers=workers) for workers in (0, 2)]
    assert results[0] == results[1]
    for name in FILES:
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_a_run_with_workers_is_resumed_without(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", StopAt(6), workers=2)
    assert train(tmp_path / "stopped", Silent(), workers=0) == train(tmp_path / "whole", Silent())
    check_same(run_config(small_data(), workers=2), run_config(small_data()))


class Unpicklable(Split):
    """A split that cannot be sent to another process, only shared with it."""

    def __reduce__(self) -> NoReturn:
        raise AssertionError("the split was pickled")


class SaysWhere(np.memmap):
    """An array in a file; gives the number of the process that reads it in place of its values."""

    def __getitem__(self, key: Any) -> Any:
        values = np.asarray(super().__getitem__(key)).copy()
        values[..., 0] = os.getpid() % 2**20
        return values


def mapped(split: Split, directory: Path, kind: type[np.memmap] = np.memmap) -> Split:
    """The split with its features in files that are mapped read-only."""
    features = {}
    for name, values in split.features.items():
        values.tofile(directory / name)
        features[name] = kind(directory / name, dtype=values.dtype, mode="r", shape=values.shape)
    return Unpicklable(features, split.lengths, split.labels, split.extras)


def test_memory_mapped_arrays_are_shared_with_the_workers(tmp_path: Path) -> None:
    split = small_data().splits["train"]
    indices = epoch_batches(split, run_config(small_data()).train, 0)
    expected = list(training_batches(split, indices, CPU, 0))
    shared = mapped(split, tmp_path)
    for batch, other in zip(training_batches(shared, indices, CPU, 2), expected, strict=True):
        assert torch.equal(batch.index, other.index)
        assert torch.equal(batch.labels, other.labels)
        assert all(torch.equal(batch.features[name], x) for name, x in other.features.items())
        assert all(torch.equal(batch.lengths[name], x) for name, x in other.lengths.items())


def test_the_workers_read_the_mapped_arrays_and_not_this_process(tmp_path: Path) -> None:
    split = mapped(small_data().splits["train"], tmp_path, SaysWhere)
    indices = epoch_batches(split, run_config(small_data()).train, 0)
    readers = {int(batch.features["audio"][0, 0, 0]) for batch in training_batches(split, indices, CPU, 2)}
    assert len(readers) == 2
    assert os.getpid() % 2**20 not in readers


@pytest.mark.parametrize(("batches", "processes"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2)])
def test_no_more_processes_start_than_can_run_ahead(
    monkeypatch: pytest.MonkeyPatch, batches: int, processes: int
) -> None:
    started = 0
    fork = os.fork

    def counted() -> int:
        nonlocal started
        started += 1
        return fork()

    monkeypatch.setattr(os, "fork", counted)
    indices = [torch.tensor([i]) for i in range(batches)]
    assert len(list(training_batches(small_data().splits["train"], indices, CPU, 2))) == batches
    assert started == processes


# What torch has half begun complains when it is collected, which is only printed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_cannot_be_started_is_one_line_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forks, fork = 0, os.fork

    def failing() -> int:
        nonlocal forks
        forks += 1
        if forks > 1:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return fork()

    monkeypatch.setattr(os, "fork", failing)
    with pytest.raises(TrainingError) as error:
        train(tmp_path / "run", Silent(), workers=2)
    monkeypatch.undo()
    assert not multiprocessing.active_children()
    assert str(error.value) == (
        f"a process that loads data cannot be started: {os.strerror(errno.ENOMEM)}; go on by --resume with fewer "
        "workers (now 2; 0 needs no such process)"
    )
    del error
    gc.collect()
    assert train(tmp_path / "run", Silent()) == train(tmp_path / "whole", Silent())


class KillsInTheSecondEpoch(SequenceDataset):
    """Kills the process of the worker that cuts the last batch of the second epoch."""

    made = 0

    def __init__(self, split: Split, extras: Sequence[str] = ()) -> None:
        super().__init__(split, extras)
        KillsInTheSecondEpoch.made += 1
        self.parent = os.getpid()
        self.last = epoch_batches(split, run_config(small_data()).train, 1)[-1].tolist()

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        if self.made == 2 and os.getpid() != self.parent and list(indices) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(indices)


# Torch reports the death from a signal handler. Where that runs inside a callback of the garbage collector (hypothesis
# has one) the error is only printed, which pytest would count; training hears of the death all the same, by its queue.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_is_one_line_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_data()
    monkeypatch.setattr(loader, "SequenceDataset", KillsInTheSecondEpoch)
    KillsInTheSecondEpoch.made = 0
    cause = r"worker \(pid.* (killed by signal: Killed|exited unexpectedly)"  # torch hears of it either way
    with pytest.raises(TrainingError, match=cause + r".*--resume with fewer workers \(now 2;") as error:
        train_run(run_config(data, workers=2), data, tmp_path, CPU, Silent())
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()  # although `error` has the frames that began them
    monkeypatch.undo()
    expected = train(tmp_path / "whole", Silent())
    observer = Silent()
    assert train(tmp_path, observer, workers=2) == expected
    assert 1 <= observer.steps <= 4  # the first epoch was done


def test_a_daemonic_process_prepares_its_batches_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = mapped(small_data().splits["train"], tmp_path, SaysWhere)
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    (batch,) = training_batches(split, [torch.arange(3)], CPU, 2)
    assert int(batch.features["audio"][0, 0, 0]) == os.getpid() % 2**20


def test_errors_that_are_not_of_workers_pass() -> None:
    with pytest.raises(RuntimeError, match=r"^shape mismatch$"), dead_workers_named(2):
        raise RuntimeError("shape mismatch")
