"""UniVA through the trainer, on the embedded data, on a file of its own format, and its ablations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_univa import SMALL, small_data

from mmer_fast.ablation import Row
from mmer_fast.ablation.plan import make_plan
from mmer_fast.data import MultiModalData
from mmer_fast.data.univa import write_univa
from mmer_fast.systems.univa import UniVA
from mmer_fast.systems.univa.ablation import ABLATION
from mmer_fast.training import Run, train
from mmer_fast.training.run import RunError
from mmer_fast.training.settings import Settings

OPTIONS: dict[str, Any] = {**SMALL, "model": "univa", "epochs": 1, "batch_size": 16, "show": False, "device": "cpu"}


@pytest.fixture(scope="module")
def data() -> MultiModalData:
    return small_data()


def test_a_run_is_there_again(data: MultiModalData, tmp_path: Path) -> None:
    run = train(data, tmp_path / "run", va_scaling="standard", trainable_similarity=True, **OPTIONS)
    (record,) = run.metrics["history"]
    assert set(record["train"]) >= {"recognition", "contrast", "prior"}
    again = Run(tmp_path / "run", "cpu")
    assert isinstance(again.model, UniVA)
    assert again.evaluate(data) == run.metrics["test"]
    without_scores = replace(data, splits={name: replace(s, extras={}) for name, s in data.splits.items()})
    assert again.predict(without_scores).probabilities.shape == (20, 6)
    assert again.predict(data).probabilities.sum(axis=1) == pytest.approx([1.0] * 20, abs=1e-5)


def test_a_set_of_its_own_format_trains_to_the_same(data: MultiModalData, tmp_path: Path) -> None:
    write_univa(data, tmp_path / "set")
    expected = train(data, tmp_path / "embedded", **OPTIONS).metrics
    got = train(tmp_path / "set", tmp_path / "converted", **OPTIONS).metrics
    assert got["history"][0]["valid"]["recognition"] == pytest.approx(
        expected["history"][0]["valid"]["recognition"], rel=1e-6
    )
    assert got["history"][0]["train"]["contrast"] == expected["history"][0]["train"]["contrast"]


def test_scores_are_needed_only_for_the_contrast(data: MultiModalData, tmp_path: Path) -> None:
    for split in (bare := small_data()).splits.values():
        split.extras.clear()
    with pytest.raises(RunError, match="train extras: expected va_text, valence and arousal"):
        train(bare, tmp_path / "refused", **OPTIONS)
    train(bare, tmp_path / "run", contrast=False, **OPTIONS)


@pytest.mark.parametrize("row", ABLATION.rows, ids=lambda row: row.slug)
def test_every_row_of_the_ablation_study_trains(row: Row, data: MultiModalData, tmp_path: Path) -> None:
    part = data if row.without is None else data.select([name for name in data.modalities if name != row.without])
    run = train(part, tmp_path / "run", **{**OPTIONS, **row.model})
    losses = run.metrics["history"][0]["train"]
    assert (losses["contrast"] > 0) == row.model.get("contrast", True)
    assert (losses["prior"] != 0) == (row.model.get("prior") != "none")  # its sign says nothing
    assert list(run.model.modalities) == list(part.modalities)


def test_the_ablation_study_is_planned(data: MultiModalData) -> None:
    plan = make_plan(ABLATION, data, Path("absent"), seeds=[0], settings=Settings("authors_roberta"))
    rows = {row.row.slug: row for row in plan.rows}
    assert [row.skipped for row in rows.values()] == [None] * 7
    models = {slug: row.runs[0].config.model for slug, row in rows.items()}
    assert (models["univa"].contrast, models["univa"].prior) == (True, "column_norm")
    assert (models["no-va-cl"].contrast, models["no-va-cl"].prior) == (False, "column_norm")
    assert (models["no-va-ecp"].contrast, models["no-va-ecp"].prior) == (True, "none")
    assert (models["neither"].contrast, models["neither"].prior) == (False, "none")
    assert list(rows["no-text"].runs[0].config.data["modalities"]) == ["video", "audio"]
