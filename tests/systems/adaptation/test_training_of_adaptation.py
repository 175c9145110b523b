"""Both systems through the trainer, on generated conversations, and from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mmer_fast.training
from mmer_fast.data import MultiModalData, load, make_dialogues, write_npz
from mmer_fast.systems.adaptation import CrossCulture, SemiSupervised, hide_labels
from mmer_fast.training.api import Run
from mmer_fast.training.run import RunError
from mmer_fast.training.systems import find_system

TINY: dict[str, Any] = {
    "dim": 8,
    "channels": 8,
    "fused_dim": 8,
    "epochs": 2,
    "batch_size": 16,
    "warmup": 0,
    "show": False,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def data() -> MultiModalData:
    return make_dialogues(0, n_train=4, n_valid=2, n_test=2)


def test_cross_culture_trains_and_is_there_again(data: MultiModalData, tmp_path: Path) -> None:
    run = mmer_fast.training.train(data, tmp_path / "run", model="cross-culture", **TINY)
    assert [set(record["train"]) >= {"recognition", "culture"} for record in run.metrics["history"]] == [True, True]
    assert isinstance(run.model, CrossCulture)
    assert Run(tmp_path / "run", "cpu").evaluate(data) == run.metrics["test"]


def test_semi_supervised_trains_from_a_file(data: MultiModalData, tmp_path: Path) -> None:
    write_npz(hide_labels(data, 0.3), tmp_path / "few.npz")
    read = load(tmp_path / "few.npz")
    assert (read.splits["train"].extras["labelled"].mean() - 0.3) < 0.02
    run = mmer_fast.training.train(tmp_path / "few.npz", tmp_path / "run", model="semi-supervised", **TINY)
    losses = run.metrics["history"][-1]["train"]
    assert min(losses["recognition"], losses["matching"], losses["reconstruction"]) > 0
    assert isinstance(run.model, SemiSupervised)
    assert Run(tmp_path / "run", "cpu").evaluate(read) == run.metrics["test"]


def test_data_without_what_is_needed_is_refused(data: MultiModalData, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected the extra labelled"):
        mmer_fast.training.train(data, tmp_path / "run", model="semi-supervised", **TINY)
    with pytest.raises(RunError, match="train labels: expected exactly one"):
        mmer_fast.training.train("synthetic", tmp_path / "run", model="cross-culture", **TINY)


@pytest.mark.parametrize("system", [CrossCulture, SemiSupervised])
@pytest.mark.parametrize("preset", ["compact", "authors"])
def test_presets_are_settings(system: type[CrossCulture] | type[SemiSupervised], preset: str) -> None:
    name = {CrossCulture: "cross-culture", SemiSupervised: "semi-supervised"}[system]
    model, train = find_system(name).preset(preset)
    assert isinstance(model, system.config_class)
    assert train.epochs > 1
