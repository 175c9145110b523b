"""M3ER goes through the trainer by its name, and its run can be opened again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mmer_fast.training
from mmer_fast.ablation import Row
from mmer_fast.data import FORMATS, MultiModalData, Split, load, make_correlated
from mmer_fast.systems.m3er import M3ER, M3ERConfig
from mmer_fast.systems.m3er.ablation import ABLATION
from mmer_fast.training.api import Run
from mmer_fast.training.systems import find_system

SIZES = {"hidden": 4, "memory": 6, "head": 5}
SMALL = {**SIZES, "epochs": 1, "batch_size": 16, "log_every": 1}
SWITCHES = (
    {},
    {"check": False, "proxy": False},
    {"proxy": False, "in_training": True},
    {"fusion": "original", "rule": "any", "feedback": False},
)


@pytest.fixture(scope="module")
def data() -> MultiModalData:
    return make_correlated(n_train=60, n_valid=12, n_test=20, max_length=6)


@pytest.mark.parametrize("switches", SWITCHES)
def test_it_trains_and_is_there_again(data: MultiModalData, tmp_path: Path, switches: dict) -> None:
    run = mmer_fast.training.train(data, tmp_path / "run", model="m3er", show=False, device="cpu", **SMALL, **switches)
    assert set(run.metrics["history"][0]["train"]) == {"recognition", "fusion", "micro_f1"}
    assert set(run.metrics["test"]["shift"]) == {"0", "1", "2"}
    again = Run(tmp_path / "run", "cpu")
    assert isinstance(again.model, M3ER)
    assert again.config.model == M3ERConfig(**{**M3ER.presets["compact"].model, **SIZES, **switches})
    assert len(again.model.proxies.training_vectors[0].vectors) == (60 if again.config.model.proxy else 0)
    assert torch.equal(again.model.check.tau, run.model.check.tau)
    assert again.evaluate(data) == run.metrics["test"]


@pytest.mark.parametrize("source", ["generated", "csd"])
def test_it_beats_every_constant_answer(source: str, tmp_path: Path, constant_f1: Callable[[Split], float]) -> None:
    """On CMU-MOSEI as the CMU-MultimodalSDK gives it, too: M3ER has published no data of its own."""
    data = make_correlated(n_train=600, n_valid=60, n_test=150, max_length=8)
    expected = constant_f1(data.splits["test"]) + 0.05
    if source == "csd":
        FORMATS["csd"].write(data, tmp_path / "mosei")
        data = load(tmp_path / "mosei")
    settings = {"hidden": 32, "memory": 32, "head": 32, "epochs": 10, "batch_size": 16, "learning_rate": 1e-2}
    run = mmer_fast.training.train(data, tmp_path / "run", model="m3er", show=False, device="cpu", **settings)
    assert run.metrics["test"]["samples"] == 150
    assert run.metrics["test"]["micro_f1"] > expected


@pytest.mark.parametrize("row", ABLATION.rows, ids=lambda row: row.slug)
def test_every_row_of_the_ablation_trains(row: Row, data: MultiModalData, tmp_path: Path) -> None:
    settings = {**SMALL, **row.model}
    run = mmer_fast.training.train(data, tmp_path / "run", model=row.system, show=False, device="cpu", **settings)
    assert {name: getattr(run.config.model, name) for name in row.model} == dict(row.model)


def test_the_authors_preset_is_what_the_slides_say() -> None:
    model, train = find_system("m3er").preset("authors")
    assert (model.hidden, model.memory, model.hidden + model.memory, model.head) == (32, 128, 160, 64)
    assert (model.components, model.fusion, model.check, model.proxy) == (100, "modified", True, True)
    assert (train.learning_rate, train.weight_decay, train.epochs, train.batch_size) == (0.01, 0.0, 500, 256)
