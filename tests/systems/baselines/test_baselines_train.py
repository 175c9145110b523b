"""The networks go through the trainer, the command line and a comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_baselines import CONFIGS, learnable_data
from typer.testing import CliRunner

import mmer_fast.training
from mmer_fast.ablation.comparison import comparison
from mmer_fast.ablation.plan import make_plan
from mmer_fast.data import FORMATS, Split, make_correlated, write_npz
from mmer_fast.systems.registry import SISTERS
from mmer_fast.training.api import Run
from mmer_fast.training.commands import app
from mmer_fast.training.settings import Settings
from mmer_fast.training.systems import find_system

NAMES = ["lstm", "mult", "hhmpn", "tailor"]
CLASSICAL = ["br", "cc", "lp"]


def small(name: str) -> dict[str, int]:
    """Settings of a small network."""
    config = CONFIGS[find_system(name).network]
    return {field: getattr(config, field) for field in ("dim", "ffn_dim", "heads", "levels") if hasattr(config, field)}


def sizes(name: str, width: int) -> dict[str, int]:
    """Settings of a network of this width."""
    return small(name) | {field: width for field in ("dim", "ffn_dim") if field in small(name)}


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_there_again(name: str, tmp_path: Path) -> None:
    data = learnable_data(24)
    kind = find_system(name)
    run = mmer_fast.training.train(
        data, tmp_path / "run", model=name, epochs=1, batch_size=8, show=False, device="cpu", **small(name)
    )
    (record,) = run.metrics["history"]
    assert set(record["train"]) == {*kind.network.loss_names, "micro_f1"}
    again = Run(tmp_path / "run", "cpu")
    assert type(again.model) is kind.network
    assert again.evaluate(data) == run.metrics["test"]


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("name", "format"), [("tailor", "tailor"), ("hhmpn", "tailor"), ("mult", "mult"), ("lstm", "npz"), ("br", "npz")]
)
def test_a_file_of_the_published_format_is_learnt(
    name: str, format: str, tmp_path: Path, constant_f1: Callable[[Split], float]
) -> None:
    """Those of LSTM and BR, which are older than all of these data, is any."""
    data = make_correlated(n_train=600, n_valid=60, n_test=150, max_length=8)
    path = tmp_path / f"features{FORMATS[format].suffix}"
    FORMATS[format].write(data, path)
    settings = {} if name in CLASSICAL else {**sizes(name, 32), "epochs": 8, "batch_size": 16, "learning_rate": 3e-3}
    run = mmer_fast.training.train(path, tmp_path / "run", model=name, show=False, device="cpu", **settings)
    assert run.model.modalities == data.modalities
    assert run.metrics["test"]["samples"] == 150
    assert run.metrics["test"]["micro_f1"] > constant_f1(data.splits["test"]) + 0.05


def test_a_row_each_in_a_comparison(tmp_path: Path) -> None:
    assert set(NAMES + CLASSICAL) <= set(SISTERS)
    suite = comparison(["robmmr", *CLASSICAL, *NAMES])
    plan = make_plan(suite, learnable_data(), tmp_path, seeds=[0], settings=Settings())
    assert [row.row.name for row in plan.rows] == [
        "RobMMR", "BR", "CC", "LP", "LSTM", "MulT", "HHMPN", "TAILOR",
    ]  # fmt: skip
    assert [row.skipped for row in plan.rows] == [None] * 8


def test_what_cannot_be_compared_is_left_out_with_the_reason(tmp_path: Path) -> None:
    data = learnable_data().select(["text"])
    data.splits["train"].labels[:, 0] = 1
    plan = make_plan(comparison(["lstm", "mult", "br"]), data, tmp_path, seeds=[0], settings=Settings())
    lstm, mult, br = (row.skipped for row in plan.rows)
    assert lstm is None
    assert "needs at least two modalities" in str(mult)
    assert "label 0 is 1 everywhere" in str(br)


@pytest.mark.usefixtures("no_report")
def test_the_command_line(tmp_path: Path) -> None:
    write_npz(learnable_data(16), tmp_path / "data.npz")
    arguments = ["train", "--model", "tailor", "--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "run")]
    sizes = [word for setting in ("dim=8", "ffn_dim=8", "heads=2", "epochs=1") for word in ("--set", setting)]
    result = CliRunner().invoke(app, [*arguments, *sizes])
    assert result.exit_code == 0, result.output
    assert "adversarial" in result.output
