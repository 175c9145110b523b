"""Which step a training takes by its configuration, and that it trains and resumes with each."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import MODEL, TRAIN, Silent, StopAt, run_config, small_data, small_model, train

from mmer_fast.training import Algorithm1, configs_from_json, configs_to_json, preset
from mmer_fast.training.fast_step import FastStep
from mmer_fast.training.trainer import Trainer

FIELDS = ("step", "share_dropout", "precision")
"""Of `TrainConfig`, that choose the step."""


def test_the_trainer_takes_the_step_of_the_configuration(tmp_path: Path) -> None:
    data = small_data()
    for name, kind in (("fast", FastStep), ("textbook", Algorithm1)):
        trainer = Trainer(small_model(data), run_config(data, step=name).train, data, tmp_path, {}, Silent())
        assert type(trainer.algorithm) is kind


def test_both_steps_train_to_the_same_history(tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0)
    histories = []
    for name in ("fast", "textbook"):
        history = train(tmp_path / name, Silent(), model, step=name)["history"]
        histories.append([[*record["train"].values(), record["gradient_ratio"]] for record in history])
    torch.testing.assert_close(torch.tensor(histories[0]), torch.tensor(histories[1]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"share_dropout": True, "app_gradient": "total"}, {"precision": "bfloat16"}], ids=str
)
def test_resumption_gives_the_same_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = train(whole, Silent(), **changes)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, StopAt(3), **changes)
    assert train(stopped, Silent(), **changes) == expected
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_configuration_from_before_the_fields_runs_the_fast_step_in_float32() -> None:
    values = configs_to_json(*preset("paper"))
    for name in FIELDS:
        del values["train"][name]
    assert configs_from_json(values) == preset("paper")
    train_config = configs_from_json(values)[1]
    assert (train_config.step, train_config.share_dropout, train_config.precision) == ("fast", False, "float32")


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("step", {"step": "slow"}),
        ("share_dropout", {"share_dropout": 1}),
        ("precision", {"precision": "float16"}),
        ("share_dropout", {"step": "textbook", "share_dropout": True}),
        ("precision", {"step": "textbook", "precision": "bfloat16"}),
        ("precision", {"perturbation": "fgsm", "precision": "bfloat16"}),
    ],
    ids=str,
)
def test_bad_values_name_the_field(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"TrainConfig\.{field} must be .*got"):
        dataclasses.replace(TRAIN, **changes)
