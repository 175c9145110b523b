"""The presets "authors" and the like against what their papers, slides and code say."""

from __future__ import annotations

from typing import Any

import pytest

from mmer_fast.training.systems import find_system

UNIVA_CODE = {"recognition_scale": 1000.0, "va_distance": 0.1, "va_scaling": "valence", "normalize": False, "views": 2}
MMGCN_CODE = {"layers": 64, "decay": 0.5, "alpha": 0.1, "variant": True, "gamma": 1.0, "dropout": 0.4}

PUBLISHED: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    (
        "univa",
        "authors",
        {**UNIVA_CODE, "temperature": 0.4, "alpha": 0.2, "contrast_weights": {"text": 3.0}, "prior": "none"},
        {"threshold": 0.18},
    ),
    (
        "univa",
        "authors_roberta",
        {**UNIVA_CODE, "temperature": 0.7, "alpha": 0.45, "contrast_weights": {"text": 3.0}, "prior": "column_norm"},
        {"threshold": 0.18},
    ),
    ("univa", "authors_m3ed", {**UNIVA_CODE, "temperature": 0.4, "alpha": 0.1, "contrast_weights": None}, {}),
    ("univa", "authors_m3ed_roberta", {**UNIVA_CODE, "temperature": 0.4, "alpha": 0.2, "contrast_weights": None}, {}),
    (
        "m3er",
        "authors",
        {"components": 100, "hidden": 32, "memory": 128, "head": 64, "fusion": "modified"},
        {"learning_rate": 0.01, "epochs": 500, "batch_size": 256, "weight_decay": 0.0},
    ),
    ("mmgcn", "paper", {"layers": 4, "gamma": 0.7, "speaker_modalities": "all"}, {"learning_rate": 3e-4}),
    (
        "mmgcn",
        "authors",
        {**MMGCN_CODE, "speaker_modalities": "text", "l2": 3e-5, "l2_form": "squared", "loss": "weighted_nll"},
        {"learning_rate": 3e-4, "batch_size": 16},
    ),
    ("mmgcn", "authors_meld", {**MMGCN_CODE, "loss": "authors_focal"}, {"learning_rate": 1e-3}),
    ("mmin", "talk", {"forward_weight": 0.1, "backward_weight": 0.1, "reduction": "sum"}, {}),
    (
        "mmin",
        "authors",
        {
            **{"forward_weight": 4.0, "backward_weight": 2.0, "reduction": "mean", "blocks": 5, "code_dim": 64},
            **{"missing": "features", "expansion": "drawn", "transition": True},
        },
        {"learning_rate": 2e-4, "batch_size": 128, "clip_norm": 1.0},
    ),
    (
        "tailor",
        "authors",
        {
            **{"dim": 256, "heads": 8, "dropout": 0.3, "language_layers": 6, "unimodal_layers": 4, "cross_layers": 3},
            **{"decoder_layers": 1, "adversarial_weight": 0.01, "orthogonal_weight": 5e-6, "common_weight": 0.5},
        },
        {"learning_rate": 5e-5, "batch_size": 64, "epochs": 20, "threshold": 0.35},
    ),
    (
        "hhmpn",
        "authors",
        {"dim": 512, "heads": 8, "feature_layers": 3, "label_layers": 3, "dropout": 0.2, "graph_threshold": 0.2},
        {"learning_rate": 1e-5, "batch_size": 8 * 8, "accumulation": 8},
    ),
    (
        "mult",
        "authors",
        {
            **{"dim": 30, "heads": 5, "levels": 5, "mask": "future", "attention_dropout": 0.1},
            **{"other_attention_dropout": 0.0, "relu_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.25},
        },
        {"learning_rate": 1e-3, "batch_size": 24, "clip_norm": 0.8, "epochs": 40},
    ),
]


@pytest.mark.parametrize(
    ("name", "preset", "model", "train"), PUBLISHED, ids=[f"{name}-{preset}" for name, preset, *_ in PUBLISHED]
)
def test_presets_have_the_published_settings(
    name: str, preset: str, model: dict[str, Any], train: dict[str, Any]
) -> None:
    configs = find_system(name).preset(preset)
    for config, expected in zip(configs, (model, train), strict=True):
        assert {field: getattr(config, field) for field in expected} == expected
