"""Early stopping: when, that a stopped run stays stopped, and what a user is told."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_training import Silent, run_config, small_data, small_model

from mmer_fast.training import trainer as trainer_module
from mmer_fast.training.shown import draw, train_shown
from mmer_fast.training.trainer import Trainer

SCORES = (0.1, 0.5, 0.5, 0.4, 0.6, 0.6, 0.2, 0.3)


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation scores of `SCORES`, one an epoch; a tie is no better score."""
    real = trainer_module.evaluate
    epochs = iter(SCORES)

    def evaluate(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {**real(*arguments, **options), "micro_f1": next(epochs)}

    monkeypatch.setattr(trainer_module, "evaluate", evaluate)


def trainer(directory: Path, **changes: Any) -> Trainer:
    data = small_data()
    config = run_config(data, epochs=8, **changes).train
    return Trainer(small_model(data), config, data, directory, {}, Silent())


@pytest.mark.parametrize(("patience", "epochs", "best"), [(1, 3, 2), (2, 4, 2), (3, 8, 5), (None, 8, 5)])
def test_training_ends_after_epochs_without_a_better_score(
    tmp_path: Path, patience: int | None, epochs: int, best: int
) -> None:
    stopped = trainer(tmp_path, patience=patience)
    assert len(stopped.fit()) == epochs
    assert stopped.progress.best_epoch == best
    assert stopped.stopped_early == (patience in (1, 2, 3))


def test_a_stopped_run_does_not_train_on_when_resumed(tmp_path: Path) -> None:
    history = trainer(tmp_path, patience=2).fit()
    again = trainer(tmp_path, patience=2)
    assert again.resume()
    before = (tmp_path / "state.safetensors").stat().st_mtime_ns
    assert again.fit() == history
    assert again.observer.steps == 0  # type: ignore[attr-defined]
    assert (tmp_path / "state.safetensors").stat().st_mtime_ns == before


def test_patience_counts_on_across_a_resumption(tmp_path: Path) -> None:
    first = trainer(tmp_path, patience=2)
    for _ in range(3):  # one epoch without a better score
        first._train_epoch()
        first._finish_epoch()
    second = trainer(tmp_path, patience=2)
    second.resume()
    assert len(second.fit()) == 4


def test_the_reason_is_said_and_the_report_has_the_epochs_that_there_were(tmp_path: Path) -> None:
    data = small_data()
    config = run_config(data, epochs=8, patience=2, checkpoint_every=0)
    out = io.StringIO()
    results = train_shown(config, data, tmp_path, torch.device("cpu"), Console(file=out, width=200))
    draw(results, data, tmp_path)
    line = "stopped early after epoch 4 of 8: no better validation micro_f1 in 2 epochs"
    assert line in out.getvalue()
    assert line in (tmp_path / "train.log").read_text()
    assert len(results["history"]) == 4
    assert "2 of 4" in (tmp_path / "report.html").read_text()
