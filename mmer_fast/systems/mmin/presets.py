"""Settings of MMIN under a name."""

from __future__ import annotations

from mmer_fast.systems.interface import Preset

PRESETS = {
    "compact": Preset(
        model={
            "dim": 64,
            "channels": 32,
            "classifier_dim": 64,
            "dropout": 0.3,
            "pretrain_epochs": 10,
            "forward_weight": 1.0,
            "backward_weight": 0.5,
            "reduction": "mean",
        },
        train={"epochs": 30, "batch_size": 64, "learning_rate": 1e-3, "clip_norm": 1.0},
    ),
    "talk": Preset(
        model={},
        train={"epochs": 80, "batch_size": 128, "learning_rate": 2e-4},
    ),
    "authors": Preset(
        model={
            "missing": "features",
            "transition": True,
            "expansion": "drawn",
            "forward_weight": 4.0,
            "backward_weight": 2.0,
            "reduction": "mean",
        },
        train={
            "epochs": 80,
            "batch_size": 128,
            "learning_rate": 2e-4,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "selection": "unweighted_accuracy",
        },
    ),
}
"""name → settings: "compact" (small, for a CPU), "talk" (the equations as the talk prints them) and "authors" (as the
published code trains: 20 epochs of pretraining, then 60).
"""
