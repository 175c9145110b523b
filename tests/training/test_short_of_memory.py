"""Memory that runs out in a step: one line that says how large the step was and which settings need less."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shortages import FOR_THE_CPU, ON_A_DEVICE, fail_in_call, fill_a_device, fill_the_memory, stops
from small_training import TRAIN, Silent, small_data, train

from mmer_fast import cli
from mmer_fast.data import write_npz
from mmer_fast.training import TrainConfig, files
from mmer_fast.training import trainer as trainer_module
from mmer_fast.training.algorithm1 import CONSISTENCY_LOSSES
from mmer_fast.training.checkpoint import read_tensors
from mmer_fast.training.files import FAILED_FILE, STATE_FILE
from mmer_fast.training.finite import is_finite
from mmer_fast.training.loop_config import LoopConfig
from mmer_fast.training.memory import Shortage, shortage, smaller_settings, step_size, unless_short
from mmer_fast.training.order import epoch_batches


def fail_in_step(monkeypatch: pytest.MonkeyPatch, number: int, fail: Callable[[], Any]) -> None:
    """Call `fail` in the step of this number, counted from 1 over all trainings from now on."""
    fail_in_call(monkeypatch, trainer_module, "accumulate_gradients", number, fail)


@pytest.mark.parametrize(
    ("fail", "cause"), [(fill_a_device, ON_A_DEVICE.rstrip(".")), (fill_the_memory, FOR_THE_CPU)], ids=["cuda", "cpu"]
)
def test_it_is_said_with_the_size_of_the_step_and_what_needs_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], Any], cause: str
) -> None:
    directory = tmp_path / "short"
    fail_in_step(monkeypatch, 6, fail)
    message = stops(directory)
    split = small_data().splits["train"]
    samples = epoch_batches(split, TRAIN, 1)[1]
    sizes = "; ".join(
        f"{name} up to {lengths_n[samples.numpy()].max()} long, {lengths_n[samples.numpy()].sum()} tokens"
        for name, lengths_n in split.lengths.items()
    )
    assert message == (
        f"memory ran out in epoch 2, step 2: {cause}; the step has 8 sample(s); {sizes}; the state is in "
        f"{directory / FAILED_FILE}; the state saved before is whole: --resume goes on where more is free; a new run "
        "needs less with --set accumulation=2 (now 1; 4 sample(s) at a time) or --batch-size below 8 or --set "
        "precision=bfloat16 or a smaller model"
    )
    good, failed = read_tensors(directory / STATE_FILE), read_tensors(directory / FAILED_FILE)
    assert failed[1].pop("batch") == samples.tolist()
    assert (failed[1]["epoch"], failed[1]["step"]) == (good[1]["epoch"], good[1]["step"]) == (1, 1)
    assert failed[0].keys() == good[0].keys()
    assert all(is_finite(tensor) for tensor in failed[0].values())
    weights = [name for name in good[0] if name.startswith(("model/", "optimizer/"))]
    assert all(torch.equal(failed[0][name], good[0][name]) for name in weights)
    observer = Silent()
    assert train(directory, observer) == train(tmp_path / "whole", Silent())
    assert observer.steps == 3


def test_memory_that_runs_out_in_the_middle_of_a_step_leaves_no_perturbed_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third pass of Algorithm 1, whose loss is that of moved weights."""
    calls = 0

    def loss(*_: Any) -> Any:
        nonlocal calls
        calls += 1
        return fill_a_device() if calls == 2 else torch.zeros((), requires_grad=True)

    monkeypatch.setitem(CONSISTENCY_LOSSES, "bernoulli", loss)
    assert stops(tmp_path).startswith("memory ran out in epoch 1, step 2: CUDA out of memory. ")
    good, failed = read_tensors(tmp_path / STATE_FILE)[0], read_tensors(tmp_path / FAILED_FILE)[0]
    weights = [name for name in good if name.startswith("model/")]
    assert all(torch.equal(failed[name], good[name]) for name in weights)


def test_without_a_saved_state_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in_step(monkeypatch, 1, fill_a_device)
    message = stops(tmp_path, accumulation=2)
    assert "; the step has 8 sample(s) in 2 micro-batches; " in message
    assert "; no state was saved before; a new run needs less with --set accumulation=4 (now 2; 2 " in message


def test_a_state_that_cannot_be_written_does_not_hide_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(path: Path, *_: Any, **__: Any) -> None:
        assert path.name == FAILED_FILE
        raise MemoryError

    fail_in_step(monkeypatch, 1, fill_the_memory)
    monkeypatch.setattr(files, "write_tensors", no_memory)
    message = stops(tmp_path)
    assert f"{FOR_THE_CPU}; the step has 8 " in message
    assert "; there is no memory to write the state; no state was saved before; " in message


def test_other_errors_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a test wants it")

    fail_in_step(monkeypatch, 1, fail)
    with pytest.raises(RuntimeError, match="a test wants it"):
        train(tmp_path, Silent())
    assert not (tmp_path / FAILED_FILE).exists()


def test_the_command_ends_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_npz(small_data(), tmp_path / "small.npz")
    fail_in_step(monkeypatch, 1, fill_a_device)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--data", str(tmp_path / "small.npz"), "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert ended.value.code == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"mmer-fast: error: memory ran out in epoch 1, step 1: {ON_A_DEVICE[:-1]}; ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "CUDA error: out of memory"),
        (torch.OutOfMemoryError("XPU out of memory. Tried\nmore"), "XPU out of memory. Tried"),
        (torch.OutOfMemoryError(), "out of memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        ),
        (
            RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: err == 0. {FOR_THE_CPU}"),
            FOR_THE_CPU,
        ),
        (RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"), None),
        (MemoryError("Unable to allocate 2.00 GiB for an array"), "Unable to allocate 2.00 GiB for an array"),
        (MemoryError(), "out of memory"),
        (RuntimeError(), None),
    ],
)
def test_what_is_said(error: Exception, said: str | None) -> None:
    assert shortage(error) == said


CUT = "--set accumulation=3 (now 2; 2 sample(s) at a time)"
HALVES, REST = "--set precision=bfloat16", "a smaller model"


@pytest.mark.parametrize(
    ("config", "whole", "settings"),
    [
        (TrainConfig(batch_size=6, accumulation=2), False, [CUT, "--batch-size below 6", HALVES, REST]),
        (TrainConfig(batch_size=6, step="textbook", accumulation=6), False, ["--batch-size below 6", REST]),
        (TrainConfig(batch_size=1, perturbation="fgsm"), False, [REST]),
        (TrainConfig(batch_size=1, precision="bfloat16", cuda_graph=True), False, ["--set cuda_graph=false", REST]),
        (LoopConfig(batch_size=6, accumulation=2), False, [CUT, "--batch-size below 6", REST]),
        (LoopConfig(batch_size=6), True, ["--batch-size below 6", REST]),
    ],
)
def test_settings_that_need_less_are_some_that_there_are(config: LoopConfig, whole: bool, settings: list[str]) -> None:
    assert smaller_settings(config, whole=whole) == settings


def test_the_size_of_a_step_is_that_of_its_samples() -> None:
    split = small_data().splits["train"]
    parts = torch.tensor([4, 0]), torch.tensor([9])
    audio, video = (split.lengths[name][[4, 0, 9]] for name in ("audio", "video"))
    assert step_size(split, parts) == (
        f"3 sample(s) in 2 micro-batches; audio up to {audio.max()} long, {audio.sum()} tokens; "
        f"video up to {video.max()} long, {video.sum()} tokens"
    )


class Large:
    """What a step holds."""


def test_what_was_held_is_free_when_the_shortage_is_heard_of() -> None:
    held: list[weakref.ref[Large]] = []

    def compute() -> None:
        large = Large()
        held.append(weakref.ref(large))
        fill_a_device()

    with pytest.raises(Shortage, match=r"^CUDA out of memory"):
        unless_short(compute)
    assert held[0]() is None
