"""Memory that runs out in validation or test: one line, and a state from which training goes on to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shortages import FOR_THE_CPU, ON_A_DEVICE, fail_in_call, fill_a_device, fill_the_memory, stops
from small_training import TRAIN, Silent, run_config, small_data, train

from mmer_fast import cli
from mmer_fast.data import Split, write_npz
from mmer_fast.training import Run, files
from mmer_fast.training import evaluate as evaluate_module
from mmer_fast.training import run as run_module
from mmer_fast.training import trainer as trainer_module
from mmer_fast.training.checkpoint import read_tensors, write_tensors
from mmer_fast.training.files import BEST_FILE, FAILED_FILE, STATE_FILE
from mmer_fast.training.loop_config import LoopConfig
from mmer_fast.training.memory import evaluation_size, smaller_evaluation
from mmer_fast.training.run import check_same, load_best

CPU = torch.device("cpu")
STEPS = 4  # of an epoch
FILES = ("metrics.json", BEST_FILE, STATE_FILE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training, not to be written to."""
    directory = tmp_path_factory.mktemp("whole")
    train(directory, Silent())
    return directory


def check_resumption(directory: Path, whole: Path, steps: int) -> None:
    observer = Silent()
    train(directory, observer)
    assert observer.steps == steps
    for name in FILES:
        assert (directory / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    ("fail", "cause"), [(fill_a_device, ON_A_DEVICE.rstrip(".")), (fill_the_memory, FOR_THE_CPU)], ids=["cuda", "cpu"]
)
@pytest.mark.parametrize("every", [0, 3])
def test_in_validation_the_state_is_saved_and_only_the_validation_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, fail: Callable[[], Any], cause: str, every: int
) -> None:
    fail_in_call(monkeypatch, trainer_module, "evaluate", 2, fail)
    message = stops(tmp_path, checkpoint_every=every)
    lengths = small_data().splits["valid"].lengths
    sizes = "; ".join(f"{name} up to {n.max()} long, {n.sum()} tokens" for name, n in lengths.items())
    assert message == (
        f"memory ran out in the validation after epoch 2: {cause}; its largest batch has 12 sample(s); {sizes}; the "
        "state is saved: --resume goes on with the validation; it needs less with --set evaluation_batch_size=6 "
        "(now 256)"
    )
    header = read_tensors(tmp_path / STATE_FILE)[1]
    assert (header["epoch"], header["step"]) == (1, STEPS)
    assert not (tmp_path / FAILED_FILE).exists()
    check_resumption(tmp_path, whole, 0)


def test_a_state_that_cannot_be_written_does_not_hide_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    def fail() -> None:
        monkeypatch.setattr(files, "write_tensors", no_memory)
        fill_a_device()

    fail_in_call(monkeypatch, trainer_module, "evaluate", 2, fail)
    message = stops(tmp_path, checkpoint_every=3)
    assert f"memory ran out in the validation after epoch 2: {ON_A_DEVICE[:-1]}; " in message
    short = f"memory ran out while {tmp_path / STATE_FILE} was written: out of memory; the state saved before is whole"
    assert f"; {short}: --resume goes on where more is free; it needs less with " in message
    monkeypatch.undo()
    check_resumption(tmp_path, whole, 1)


@pytest.mark.parametrize(("call", "split"), [(1, "train"), (2, "valid"), (3, "test")])
def test_in_the_evaluation_at_the_end_training_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, call: int, split: str
) -> None:
    fail_in_call(monkeypatch, run_module, "evaluate", call)
    message = stops(tmp_path)
    said = f"memory ran out in the evaluation of the best model on the {split} split: {ON_A_DEVICE[:-1]}; its largest "
    assert message.startswith(f"{said}batch has {len(small_data().splits[split])} sample(s); ")
    assert "; training has ended and its state is saved: --resume evaluates again; it needs less with --set " in message
    assert not (tmp_path / "metrics.json").exists()
    check_resumption(tmp_path, whole, 0)


def test_in_the_recall_of_the_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    fail_in_call(monkeypatch, run_module, "mask_recall", 1)
    assert stops(tmp_path).startswith("memory ran out in the recall of the masks on the test split: CUDA out of memory")
    check_resumption(tmp_path, whole, 0)


def test_other_errors_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a test wants it")

    fail_in_call(monkeypatch, trainer_module, "evaluate", 1, fail)
    with pytest.raises(RuntimeError, match=r"^a test wants it$"):
        train(tmp_path, Silent())


def test_logits_that_are_not_finite_at_the_end_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FloatingPointError("the model's logits are not finite")

    fail_in_call(monkeypatch, run_module, "evaluate", 3, fail)
    expected = "the model's logits are not finite on the test split, of the best model; training has ended"
    assert stops(tmp_path) == expected


def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that are asked for of the batches of evaluations from now on."""
    seen: list[int] = []
    real = evaluate_module.sorted_batches

    def watched(split: Split, size: int, *more: Any) -> Any:
        seen.append(size)
        return real(split, size, *more)

    monkeypatch.setattr(evaluate_module, "sorted_batches", watched)
    return seen


def test_the_batches_are_as_large_as_asked_for_wherever_the_run_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = batch_sizes(monkeypatch)
    results = train(tmp_path / "run", Silent(), evaluation_batch_size=7)
    assert set(seen) == {7}
    data = tmp_path / "small.npz"
    write_npz(small_data(), data)
    run = Run(tmp_path / "run", "cpu")
    assert run.evaluate(data) == results["test"]
    run.predict(data)
    run.report(tmp_path / "report.html", data=data)
    assert set(seen) == {7}
    for more, size in (([], 7), (["--batch-size", "5"], 5)):
        for command in (["evaluate"], ["evaluate", "--conditions"], ["predict", "--out", str(tmp_path / "p.csv")]):
            seen.clear()
            with pytest.raises(SystemExit) as ended:
                cli.main([*command, "--run", str(run.directory), "--data", str(data), "--device", "cpu", *more])
            assert not ended.value.code, capsys.readouterr().err
            assert set(seen) == {size}, command


def test_the_size_may_change_on_resumption_and_files_without_it_are_read(tmp_path: Path, whole: Path) -> None:
    check_same(run_config(small_data()), run_config(small_data(), evaluation_batch_size=3))
    tensors, header = read_tensors(whole / BEST_FILE)
    del header["evaluation_batch_size"]
    write_tensors(tmp_path / BEST_FILE, tensors, header)
    assert load_best(tmp_path, CPU)[1]["evaluation_batch_size"] == 256


@pytest.mark.parametrize(("call", "name"), [(1, STATE_FILE), (3, BEST_FILE), (4, STATE_FILE)])
def test_memory_that_runs_out_while_a_file_is_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, call: int, name: str
) -> None:
    """In the state after step 2, the best model and the state after it."""
    fail_in_call(monkeypatch, files, "write_tensors", call, fill_the_memory)
    message = stops(tmp_path, checkpoint_every=2)
    assert message.startswith(f"memory ran out while {tmp_path / name} was written: {FOR_THE_CPU}; ")
    saved = "no state was saved before" if call == 1 else "the state saved before is whole: --resume goes on where more"
    assert f"; {saved}" in message
    assert not (tmp_path / FAILED_FILE).exists()
    check_resumption(tmp_path, whole, 8 if call == 1 else 4)


def test_logits_that_are_not_finite_end_a_command_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], whole: Path
) -> None:
    def infinite(*_: Any) -> torch.Tensor:
        return torch.full((20, 6), torch.inf)

    data = tmp_path / "small.npz"
    write_npz(small_data(), data)
    monkeypatch.setattr(evaluate_module, "predict_logits", infinite)
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "--run", str(whole), "--data", str(data), "--device", "cpu"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "mmer-fast: error: the model's logits are not finite\n"


def test_any_command_that_runs_out_of_memory_ends_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], whole: Path
) -> None:
    data = tmp_path / "small.npz"
    write_npz(small_data(), data)
    fail_in_call(monkeypatch, evaluate_module, "sorted_batches", 1, fill_the_memory)
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "--run", str(whole), "--data", str(data), "--device", "cpu"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"mmer-fast: error: memory ran out: {FOR_THE_CPU}\n"


def split_of(lengths: list[int], groups: list[int]) -> Split:
    features = np.zeros((len(lengths), max(lengths), 1), dtype=np.float32)
    labels = np.zeros((len(lengths), 1), dtype=np.uint8)
    return Split({"a": features}, {"a": np.array(lengths)}, labels, {"dialogue": np.array(groups)})


@pytest.mark.parametrize(
    ("size", "group", "largest", "less"),
    [
        (4, None, "2 sample(s); a up to 9 long, 17 tokens", "--set evaluation_batch_size=1 (now 4)"),
        (3, None, "3 sample(s); a up to 9 long, 20 tokens", "--set evaluation_batch_size=1 (now 3)"),
        (1, None, "1 sample(s); a up to 9 long, 9 tokens", "a smaller model, in a new run"),
        (6, "dialogue", "6 sample(s); a up to 9 long, 24 tokens", "--set evaluation_batch_size=3 (now 6)"),
        (3, "dialogue", "4 sample(s); a up to 9 long, 21 tokens", "a smaller model, in a new run"),
    ],
)
def test_what_needs_less_is_something_that_there_is(size: int, group: str | None, largest: str, less: str) -> None:
    split = split_of([1, 2, 1, 3, 8, 9], [0, 0, 1, 1, 1, 1])
    config = LoopConfig(batch_size=TRAIN.batch_size, evaluation_batch_size=size)
    assert evaluation_size(split, config, group) == f"its largest batch has {largest}"
    assert smaller_evaluation(split, config, group) == less
