"""The talk's table: the same model and samples with some modalities left out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from small_mmin import MODALITIES, SMALL, small_config, small_data, trained_mmin
from typer.testing import CliRunner

import mmer_fast.training
from mmer_fast.data import SequenceDataset, write_npz
from mmer_fast.models import RobMMR, RobMMRConfig
from mmer_fast.systems.mmin import MMIN
from mmer_fast.systems.mmin.evaluation import evaluate_conditions
from mmer_fast.training.commands import app


def test_wa_and_ua_are_those_of_samples_without_the_modality() -> None:
    data = small_data(n_test=30)
    split = data.splits["test"]
    model = trained_mmin(data, pretrain_epochs=10)
    table = evaluate_conditions(model, split, batch_size=7)
    batch = SequenceDataset(split).__getitems__(list(range(30)))
    batch.lengths["text"][:] = 0
    batch.lengths["audio"][:] = 0
    predicted = model.logits(batch).argmax(dim=1).numpy()
    truth = split.labels.argmax(axis=1)
    recalls = [(predicted[truth == k] == k).mean() for k in range(3)]
    assert table.missing["video",] == pytest.approx(
        {"overall_accuracy": (predicted == truth).mean(), "unweighted_accuracy": np.mean(recalls)}
    )
    for metric in ("overall_accuracy", "unweighted_accuracy"):
        assert table.average[metric] == pytest.approx(np.mean([row[metric] for row in table.missing.values()]))
    assert table.full != table.missing["video",]


def test_columns_are_in_the_order_of_the_talk() -> None:
    table = evaluate_conditions(MMIN(MODALITIES, 3, small_config()), small_data().splits["test"])
    titles = ["text", "video", "audio", "text+video", "text+audio", "video+audio", "average", "text+video+audio"]
    assert list(table.columns()) == titles
    lines = table.markdown().splitlines()
    assert lines[0] == f"|  | {' | '.join(titles)} |"
    assert lines[2].startswith(f"| WA | {table.missing['text',]['overall_accuracy']:.3f} |")
    assert len(lines) == 4
    assert lines[3].startswith("| UA |")


def test_labels_have_f1() -> None:
    model, split = MMIN(MODALITIES, 3, small_config(outputs="labels")), small_data().splits["test"]
    assert list(evaluate_conditions(model, split).full) == ["micro_f1", "macro_f1"]
    everything, nothing = (evaluate_conditions(model, split, threshold=t).full["micro_f1"] for t in (0.0, 1.0))
    assert everything == pytest.approx(0.5)  # one of three labels is there
    assert nothing == 0


def test_one_modality_has_no_average() -> None:
    data = small_data().select(["audio"])
    model = MMIN(data.modalities, 3, small_config(imagination="none", conditions="full"))
    table = evaluate_conditions(model, data.splits["test"])
    assert list(table.columns()) == ["average", "audio"]
    assert math.isnan(table.average["overall_accuracy"])


def test_another_system_has_such_a_table_too() -> None:
    config = RobMMRConfig(dim=8, ffn_dim=8, heads=2, unimodal_blocks=1, multimodal_blocks=1)
    table = evaluate_conditions(RobMMR(MODALITIES, 3, config), small_data().splits["test"])
    assert len(table.missing) == 6


def test_the_command_prints_it(tmp_path: Path) -> None:
    data = small_data()
    write_npz(data, tmp_path / "data.npz")
    run = mmer_fast.training.train(data, tmp_path / "run", model="mmin", epochs=2, batch_size=8, show=False, **SMALL)
    expected = evaluate_conditions(run.model, data.splits["valid"]).columns()
    arguments = ["evaluate", "--run", str(run.directory), "--data", str(tmp_path / "data.npz"), "--split", "valid"]
    shown = CliRunner().invoke(app, [*arguments, "--conditions"])
    assert shown.exit_code == 0, shown.output
    (line,) = [line for line in shown.output.splitlines() if "text+video+audio" in line]
    assert f"{expected['text+video+audio']['overall_accuracy']:.4f}" in line
    got = json.loads(CliRunner().invoke(app, [*arguments, "--conditions", "--json"]).output)
    assert got == {condition: pytest.approx(metrics) for condition, metrics in expected.items()}


def test_the_command_needs_something_that_can_be_missing(tmp_path: Path) -> None:
    data = small_data().select(["audio"])
    settings = {**SMALL, "imagination": "none", "conditions": "full", "epochs": 2, "batch_size": 8}
    mmer_fast.training.train(data, tmp_path / "run", model="mmin", show=False, **settings)
    write_npz(data, tmp_path / "data.npz")
    arguments = ["evaluate", "--run", str(tmp_path / "run"), "--data", str(tmp_path / "data.npz"), "--conditions"]
    result = CliRunner().invoke(app, arguments)
    assert "--conditions: expected at least two modalities, got audio" in str(result.exception)
