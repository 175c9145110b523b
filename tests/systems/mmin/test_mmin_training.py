"""MMIN through the trainer: two phases, resumption between and within them, and what it learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_mmin import SMALL, small_data, trained_mmin

import mmer_fast.training
from mmer_fast.data import MultiModalData, SequenceDataset
from mmer_fast.data.mmin import write_mmin
from mmer_fast.systems.mmin import MMIN, unified
from mmer_fast.systems.mmin.evaluation import evaluate_conditions
from mmer_fast.training.api import Run
from mmer_fast.training.observers import Observers
from mmer_fast.training.run import configured_run, train_run
from mmer_fast.training.systems import find_system

TINY: dict[str, Any] = {**SMALL, "epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "warmup": 0}


@pytest.fixture(scope="module")
def data() -> MultiModalData:
    return small_data()


def test_no_epoch_of_pretraining_is_the_best(data: MultiModalData, tmp_path: Path) -> None:
    """With a learning rate of next to nothing, the first epoch would stay the best one."""
    run = mmer_fast.training.train(
        data, tmp_path / "run", model="mmin", **{**TINY, "pretrain_epochs": 2, "learning_rate": 1e-9}, show=False
    )
    history = run.metrics["history"]
    assert [record.get("pretraining", False) for record in history] == [True, True, False]
    assert [record["train"]["forward"] > 0 for record in history] == [False, False, True]
    assert run.metrics["best_epoch"] == 3
    assert isinstance(run.model, MMIN)
    assert run.model.imagines
    assert Run(tmp_path / "run", "cpu").evaluate(data) == run.metrics["test"]


@pytest.mark.parametrize("pretrain_epochs", [2, 1])
def test_a_run_that_was_only_pretrained_says_so(data: MultiModalData, tmp_path: Path, pretrain_epochs: int) -> None:
    settings = {**TINY, "epochs": 2, "pretrain_epochs": pretrain_epochs}
    run = mmer_fast.training.train(data, tmp_path / "run", model="mmin", **settings, show=False)
    for name in ("train.log", "report.html"):
        text = (run.directory / name).read_text(encoding="utf-8")
        assert ("All 2 epochs were pretraining: the whole network was never trained" in text) == (pretrain_epochs == 2)


def test_patience_does_not_end_pretraining(data: MultiModalData, tmp_path: Path) -> None:
    settings = {**TINY, "epochs": 6, "pretrain_epochs": 3, "patience": 1, "learning_rate": 1e-9}
    run = mmer_fast.training.train(data, tmp_path / "run", model="mmin", **settings, show=False)
    assert len(run.metrics["history"]) == 5
    assert run.metrics["best_epoch"] == 4


class StopAt(Observers):
    """Raises KeyboardInterrupt after a number of steps, as a signal would."""

    def __init__(self, steps: int) -> None:
        super().__init__([])
        self.left = steps

    def on_step(self, *arguments: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_resuming_in_either_phase_gives_the_same_bits(data: MultiModalData, tmp_path: Path, stop: int) -> None:
    """Three steps an epoch: stopped within pretraining, at its end, and in and after the first epoch of imagination."""
    kind = find_system("mmin")
    model, train = kind.preset("compact")
    model = dataclasses.replace(model, **{**SMALL, "text_dropout": 0.3, "dropout": 0.3, "expansion": "drawn"})
    train = dataclasses.replace(train, epochs=2, batch_size=8, checkpoint_every=1)
    config = configured_run(kind, (model, train), data)

    def trained(name: str, steps: int) -> dict[str, Any]:
        (tmp_path / name).mkdir(exist_ok=True)
        return train_run(config, data, tmp_path / name, torch.device("cpu"), StopAt(steps))

    whole = trained("whole", 100)
    with pytest.raises(KeyboardInterrupt):
        trained("stopped", stop)
    assert trained("stopped", 100) == whole


def test_it_recognises_whatever_modalities_are_there_and_imagines_the_others() -> None:
    data = small_data(n_train=90, n_test=60)
    test = data.splits["test"]
    majority = test.labels.mean(axis=0).max()
    model = trained_mmin(data, 80, pretrain_epochs=30, dim=8, code_dim=8)
    table = evaluate_conditions(model, test)
    assert majority < 0.5
    assert table.full["overall_accuracy"] > 0.9
    assert all(row["overall_accuracy"] > 0.8 for row in table.missing.values())
    batch = SequenceDataset(test).__getitems__(list(range(60)))
    with torch.no_grad():
        available = torch.tensor([True, True, False]).expand(60, 1, 3)
        h_bmd, absent_md = model.embed(batch)
        audio = model.imagination(unified(h_bmd, available, absent_md)).forward[:, -8:]
        target = model.embed(batch, model.teacher)[0][:, -1]
    of_others = audio.roll(7, dims=0)
    assert (audio - target).square().mean() < 0.9 * (of_others - target).square().mean()


def test_it_learns_from_a_folder_of_its_own_format(tmp_path: Path) -> None:
    data = small_data(n_train=60, n_test=40)
    write_mmin(data, tmp_path / "iemocap")
    settings = {**TINY, "dim": 8, "code_dim": 8, "pretrain_epochs": 4, "epochs": 12}
    run = mmer_fast.training.train(tmp_path / "iemocap", tmp_path / "run", model="mmin", **settings, show=False)
    assert isinstance(run.model, MMIN)
    assert run.model.imagines
    assert list(run.model.modalities) == ["text", "video", "audio"]
    majority = data.splits["test"].labels.mean(axis=0).max()
    assert run.metrics["test"]["overall_accuracy"] > majority + 0.3


@pytest.mark.parametrize("preset", MMIN.presets)
def test_presets_are_settings(preset: str) -> None:
    model, train = find_system("mmin").preset(preset)
    assert 0 < model.pretrain_epochs < train.epochs
