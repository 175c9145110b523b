"""Run directories: what is remembered, and what has to be the same on resumption."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score
from small_training import Silent, run_config, small_data, train

from mmer_fast.training import trainer
from mmer_fast.training.checkpoint import CheckpointError, write_json
from mmer_fast.training.evaluate import evaluate, predict_probabilities
from mmer_fast.training.run import RunConfig, RunError, check_same, describe_data, holds_run, load_best


def test_the_configuration_comes_back(tmp_path: Path) -> None:
    config = run_config(small_data())
    write_json(tmp_path / "config.json", config.to_json())
    assert RunConfig.read(tmp_path) == config
    check_same(config, RunConfig.read(tmp_path))


def test_every_differing_field_is_named_with_both_values() -> None:
    data = small_data()
    stored = run_config(data)
    model = dataclasses.replace(stored.model, dim=32)
    asked = dataclasses.replace(run_config(data, epochs=5), model=model)
    with pytest.raises(
        RunError, match=r"model\.dim: the run has 16, asked for 32; train\.epochs: the run has 2, asked for 5"
    ):
        check_same(stored, asked)


def test_other_data_are_noticed() -> None:
    data = small_data()
    stored = run_config(data)
    other = small_data()
    other.splits["train"].features["audio"][0, 0, 0] += 1
    with pytest.raises(RunError, match=r"data\.checksum\.train"):
        check_same(stored, run_config(other))
    other = small_data()
    other.splits["train"].extras["va_audio"][0, 0] += 0.5  # which some systems learn from
    with pytest.raises(RunError, match=r"data\.checksum\.train"):
        check_same(stored, run_config(other))
    other = small_data()
    other.splits["valid"].lengths["audio"][0] -= 1
    with pytest.raises(RunError, match=r"data\.checksum\.valid"):
        check_same(stored, run_config(other))
    other = small_data()
    other.splits["test"].labels[0, 0] ^= 1
    with pytest.raises(RunError, match=r"data\.checksum\.test"):
        check_same(stored, run_config(other))
    with pytest.raises(RunError, match=r"data\.modalities"):
        check_same(stored, run_config(data.select(["video", "audio"])))
    renamed = dataclasses.replace(data, label_names=[name.upper() for name in data.label_names])
    with pytest.raises(RunError, match=r"data\.label_names"):
        check_same(stored, run_config(renamed))


def test_the_results_are_those_of_the_best_model_at_the_threshold_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first of two epochs, by scores that say so."""
    scores = iter([0.9, 0.1])

    def scripted(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {**evaluate(*arguments, **options), "micro_f1": next(scores)}

    monkeypatch.setattr(trainer, "evaluate", scripted)
    results = train(tmp_path, Silent(), threshold=0.3)
    model, header = load_best(tmp_path, torch.device("cpu"))
    assert (results["best_epoch"], header["threshold"], model.training) == (1, 0.3, False)
    split = small_data().splits["test"]
    predicted = predict_probabilities(model, split) > 0.3
    assert results["test"]["micro_f1"] == pytest.approx(f1_score(split.labels, predicted, average="micro"))
    assert [record["valid"]["accuracy"] for record in results["history"]].count(results["valid"]["accuracy"]) == 1
    assert results["valid"]["accuracy"] == results["history"][0]["valid"]["accuracy"]


def test_source_and_checkpoint_interval_may_change() -> None:
    data = small_data()
    moved = dataclasses.replace(data, source="elsewhere.npz")
    check_same(run_config(data), run_config(moved, checkpoint_every=7))


def test_the_description_has_no_arrays() -> None:
    description = describe_data(small_data())
    assert description["modalities"] == {"audio": 74, "video": 35}
    assert description["samples"] == {"train": 30, "valid": 12, "test": 20}


@pytest.mark.parametrize("values", [{}, [], {"model": {}, "train": {"x": 1}, "data": {}}])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, values: object) -> None:
    write_json(tmp_path / "config.json", values)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        RunConfig.read(tmp_path)


def test_a_run_is_recognised(tmp_path: Path) -> None:
    assert not holds_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert not holds_run(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    assert holds_run(tmp_path)
