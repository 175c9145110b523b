"""A process that dies between the best model and the state leaves the model of an epoch that the state has not done."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import Silent, StopAt, train

from mmer_fast.training import files
from mmer_fast.training import trainer as trainer_module
from mmer_fast.training.best import Best, is_better
from mmer_fast.training.checkpoint import CheckpointError, read_json, read_tensors, write_tensors
from mmer_fast.training.files import BEST_FILE, PREVIOUS_FILE, STATE_FILE
from mmer_fast.training.run import load_best

FILES = ("metrics.json", BEST_FILE, STATE_FILE)
CPU = torch.device("cpu")
LOW, HIGH, LESS, MORE = 0.3, 0.5, 0.4, 0.6


def script(
    monkeypatch: pytest.MonkeyPatch, scores: Sequence[float], real: Callable[..., Any] = trainer_module.evaluate
) -> None:
    """Let the next validations have these scores, as another machine might find others than the first one did."""
    left = iter(scores)

    def evaluate(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {**real(*arguments, **options), "micro_f1": next(left)}

    monkeypatch.setattr(trainer_module, "evaluate", evaluate)


def die_after_the_model_of_epoch(directory: Path, epoch: int, **changes: Any) -> None:
    """Train until the best model of this epoch is on disk, and the state after it is not."""

    class Died(Exception):
        pass

    def deadly(path: Path, tensors: Any, header: Any, **options: Any) -> None:
        write_tensors(path, tensors, header, **options)
        if path.name == BEST_FILE and header["training"]["epoch"] == epoch:
            raise Died

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write_tensors", deadly)
        with pytest.raises(Died):
            train(directory, Silent(), **changes)
    assert load_best(directory, CPU)[1]["training"]["epoch"] == epoch
    if (directory / STATE_FILE).exists():
        assert read_tensors(directory / STATE_FILE)[1]["epoch"] == epoch - 1


def told(directory: Path) -> tuple[int, float]:
    """Epoch and score of the best model by its own words, which `metrics.json` has to share."""
    entry = load_best(directory, CPU)[1]["training"]
    assert read_json(directory / "metrics.json")["best_epoch"] == entry["epoch"]
    assert read_tensors(directory / STATE_FILE)[1]["best_epoch"] == entry["epoch"]
    return entry["epoch"], entry["value"]


@pytest.mark.parametrize("every", [0, 1, 3])
@pytest.mark.parametrize("epoch", [1, 2])
def test_the_resumed_training_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int, every: int
) -> None:
    script(monkeypatch, [LOW, HIGH] * 2)
    train(tmp_path / "whole", Silent(), checkpoint_every=every)
    die_after_the_model_of_epoch(tmp_path / "died", epoch, checkpoint_every=every)
    script(monkeypatch, [LOW, HIGH][epoch - 1 :])
    train(tmp_path / "died", Silent(), checkpoint_every=every)
    for name in (*FILES, PREVIOUS_FILE):
        assert (tmp_path / "died" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_model_that_the_same_epoch_does_not_reach_again_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do later epochs that are better than it by the history, but not than what is on disk."""
    script(monkeypatch, [LOW, HIGH, 0.1, 0.2, LESS, LOW])
    die_after_the_model_of_epoch(tmp_path, 2, epochs=5)
    written = (tmp_path / BEST_FILE).read_bytes()
    expected = (
        "epoch 2, trained again, has a validation micro_f1 of 0.1000; the model that was saved of it before has 0.5000"
    )
    with pytest.warns(UserWarning, match=re.escape(expected)), pytest.raises(KeyboardInterrupt):
        train(tmp_path, StopAt(7), epochs=5)
    train(tmp_path, Silent(), epochs=5)
    assert told(tmp_path) == (2, HIGH)
    assert (tmp_path / BEST_FILE).read_bytes() == written


@pytest.mark.parametrize("every", [0, 1])
def test_of_the_first_epoch_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    script(monkeypatch, [HIGH, LOW, LESS])
    die_after_the_model_of_epoch(tmp_path, 1, checkpoint_every=every)
    with pytest.warns(UserWarning, match=r"epoch 1, trained again, .* is kept$"):
        train(tmp_path, Silent(), checkpoint_every=every)
    assert told(tmp_path) == (1, HIGH)


@pytest.mark.parametrize(
    ("scores", "best"), [([MORE, LESS], (2, MORE)), ([0.1, MORE], (3, MORE)), ([HIGH, MORE], (3, MORE))]
)
@pytest.mark.filterwarnings("ignore:epoch 2, trained again")
def test_a_better_model_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float], best: tuple[int, float]
) -> None:
    script(monkeypatch, [LOW, HIGH, *scores])
    die_after_the_model_of_epoch(tmp_path, 2, epochs=3)
    train(tmp_path, Silent(), epochs=3)
    assert told(tmp_path) == best


def test_patience_counts_from_the_epoch_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [LOW, HIGH, 0.1, LESS, LESS, LESS])
    die_after_the_model_of_epoch(tmp_path, 2, epochs=6, patience=2)
    with pytest.warns(UserWarning, match="is kept"):
        results = train(tmp_path, Silent(), epochs=6, patience=2)
    assert len(results["history"]) == 4
    assert told(tmp_path) == (2, HIGH)


def test_a_damaged_state_after_the_model_goes_on_from_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, [LOW, HIGH, HIGH])
    train(tmp_path / "whole", Silent(), checkpoint_every=0)
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    (tmp_path / "damaged" / STATE_FILE).write_bytes(b"half of it")
    with pytest.warns(UserWarning, match="going on from the state before it"):
        train(tmp_path / "damaged", Silent(), checkpoint_every=0)
    for name in (*FILES, PREVIOUS_FILE):
        assert (tmp_path / "damaged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("epoch", [1, 5])
def test_a_model_of_an_epoch_that_cannot_be_the_best_is_an_error_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    script(monkeypatch, [LOW, HIGH, MORE])
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, StopAt(9), epochs=3)
    tensors, header = read_tensors(tmp_path / BEST_FILE)
    header["training"]["epoch"] = epoch
    write_tensors(tmp_path / BEST_FILE, tensors, header)
    observer = Silent()
    expected = (
        rf"{BEST_FILE} is of epoch {epoch}, but the state expects the best model so far, of epoch 2: restore a copy"
    )
    with pytest.raises(CheckpointError, match=expected):
        train(tmp_path, observer, epochs=3)
    assert observer.steps == 0


def test_pretraining_is_worse_than_any_epoch_of_the_whole_network() -> None:
    history = [{"epoch": 1, "valid": {"m": HIGH}, "pretraining": True}, {"epoch": 2, "valid": {"m": LOW}}]
    assert is_better(history, Best(1, HIGH), "m")
    assert is_better(history, None, "m")
    assert not is_better([history[1] | {"epoch": 1}, history[0] | {"epoch": 2}], Best(1, LOW), "m")
    assert not is_better(history, Best(2, LESS), "m")


@pytest.mark.parametrize("score", [LESS, MORE])
def test_a_best_model_that_does_not_tell_its_score_has_that_of_its_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: float
) -> None:
    script(monkeypatch, [HIGH, LOW, score])
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, StopAt(9), epochs=3)
    tensors, header = read_tensors(tmp_path / BEST_FILE)
    del header["training"]
    write_tensors(tmp_path / BEST_FILE, tensors, header)
    assert train(tmp_path, Silent(), epochs=3)["best_epoch"] == (3 if score > HIGH else 1)
