"""Presets against the table of differences between paper and published code; JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mmer_fast.training import PRESETS, TrainConfig, configs_from_json, configs_to_json, preset

TABLE = [
    # (section, field, paper, authors)
    ("model", "mask_largest", True, False),
    ("model", "mask_ratio", 0.4, 0.4),
    ("model", "mask_count", None, 24),
    ("model", "mask_epsilon", 0.1, 0.1),
    ("model", "mask_solver", "newton", "sinkhorn"),
    ("model", "mask_iterations", None, 100),
    ("model", "mask_normalizer", 1.0, "max"),
    ("model", "masked_input", "features", "embedding"),
    ("model", "reversal", "mask_network", "scores"),
    ("model", "reversal_scale", 0.1, 0.1),
    ("train", "app_gradient", "recognition", "total"),
    ("train", "perturbation_norm", "global", "tensor"),
    ("train", "gamma", 0.03, 1.0),
    ("train", "perturbed", "projections", "all"),
    ("train", "recognition_loss", "bce", "asymmetric"),
    ("train", "consistency_loss", "bernoulli", "softmax"),
    ("train", "rho", 0.1, 0.1),
    ("train", "sigma", 1.0, 1.0),
    ("model", "unimodal_blocks", 4, 3),
    ("model", "multimodal_blocks", 4, 3),
    ("model", "decoder_blocks", 1, 1),
    ("model", "heads", 8, 8),
    ("model", "dim", 512, 512),
    ("model", "ffn_dim", 1024, 1024),
    ("model", "dropout", 0.1, 0.1),
    ("train", "batch_size", 64, 128),
    ("train", "learning_rate", 5e-5, 5e-5),
    ("train", "epochs", 10, 10),
    ("train", "schedule", "iteration", "epoch"),
    ("train", "warmup", 10, 10),
    ("train", "selection", "micro_f1", "accuracy"),
    ("model", "classifier", "per_label", "shared"),
    ("model", "classifier_dropout", 0.0, 0.1),
    ("model", "padding_mask", True, False),
    ("model", "padded_length", None, 60),
    ("model", "positions", "none", "none"),
    ("train", "weight_decay", 1e-2, 1e-2),
    ("train", "clip_norm", None, 1.0),
]


@pytest.mark.parametrize(("section", "field", "paper", "authors"), TABLE, ids=lambda value: str(value))
def test_presets_hold_the_table(section: str, field: str, paper: object, authors: object) -> None:
    for name, expected in (("paper", paper), ("authors", authors)):
        model, train = preset(name)
        assert getattr(model if section == "model" else train, field) == expected


def test_compact_is_the_papers_method_in_a_small_network() -> None:
    model, train = preset("compact")
    paper_model, paper_train = preset("paper")
    sizes = (model.dim, model.ffn_dim, model.unimodal_blocks, model.multimodal_blocks, model.decoder_blocks)
    assert sizes == (128, 256, 2, 2, 1)
    assert train.batch_size == 64
    method = (
        "mask_largest",
        "mask_ratio",
        "masked_input",
        "reversal",
        "reversal_scale",
        "classifier",
        "padding_mask",
    )
    assert all(getattr(model, field) == getattr(paper_model, field) for field in method)
    method = (
        "rho",
        "sigma",
        "perturbation_norm",
        "perturbed",
        "app_gradient",
        "recognition_loss",
        "consistency_loss",
    )
    assert all(getattr(train, field) == getattr(paper_train, field) for field in method)


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_json(name: str) -> None:
    configs = preset(name)
    assert configs_from_json(json.loads(json.dumps(configs_to_json(*configs)))) == configs


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="paper, authors, compact"):
        preset("large")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"dimm": 3}}, "unknown RobMMRConfig field.*dimm"),
        ({"train": {"rho": "0.1"}}, r"TrainConfig\.rho"),
        ({"train": {"epochs": 2.5}}, r"TrainConfig\.epochs"),
        ({"train": {"app_batch": "rank"}}, r"TrainConfig\.app_batch"),
        ({"extra": {}}, "sections model and train"),
    ],
)
def test_json_of_another_form_is_refused(change: dict, message: str) -> None:
    values = configs_to_json(*preset("paper"))
    with pytest.raises(ValueError, match=message):
        configs_from_json({**values, **change})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gamma", 0.0),
        ("rho", -0.1),
        ("batch_size", 0),
        ("selection", "loss"),
        ("clip_norm", 0.0),
        ("threshold", 2),
        ("accumulation", 0),
        ("accumulation", 3),
        ("patience", 0),
        ("workers", -1),
        ("clip_norm", float("inf")),
        ("rho", float("inf")),
        ("weight_decay", float("nan")),
        ("seed", 2**63),
    ],
)
def test_bad_values_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"TrainConfig\.{field} must be .*got"):
        dataclasses.replace(TrainConfig(), **{field: value})
