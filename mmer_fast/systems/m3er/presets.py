"""Settings of M3ER under a name."""

from __future__ import annotations

from mmer_fast.systems.interface import Preset

PRESETS = {
    "compact": Preset(
        model={
            "input_dropout": 0.3,
            "dropout": 0.2,
            "components": 32,
            "cca_ridge": 0.1,
            "neighbours": 128,
            "proxy_ridge": 0.1,
            "detach_weights": True,
        },
        train={"learning_rate": 0.01, "epochs": 20, "batch_size": 64, "clip_norm": 1.0},
    ),
    "authors": Preset(
        train={"learning_rate": 0.01, "epochs": 500, "batch_size": 256, "weight_decay": 0.0},
    ),
}
"""Of "authors" batch size, epochs, optimiser (Adam: no weight decay) and rate are published, and the sizes, which are
the defaults of `M3ERConfig`.
"""
