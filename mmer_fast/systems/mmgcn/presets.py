"""Settings of MMGCN under a name, for the model and its training."""

from __future__ import annotations

from mmer_fast.systems.interface import Preset

_CODE = {
    "gamma": 1.0,
    "layers": 64,
    "speaker_modalities": "text",
    "speaker_join": "add",
    "l2_form": "squared",
}
_ADAM = {"weight_decay": 0.0, "warmup": 0, "batch_size": 16, "selection": "weighted_f1"}

PRESETS = {
    "compact": Preset(
        model={"dim": 64, "graph_dim": 64, "speaker_dim": 16, "recurrent_layers": 1, "standardize": True},
        train={**_ADAM, "learning_rate": 5e-3, "batch_size": 8, "epochs": 20},
    ),
    "paper": Preset(train={**_ADAM, "learning_rate": 3e-4, "epochs": 20}),
    "authors": Preset(
        model={**_CODE, "loss": "weighted_nll"},
        train={**_ADAM, "learning_rate": 3e-4, "epochs": 20},
    ),
    "authors_meld": Preset(
        model={**_CODE, "loss": "authors_focal", "l2": 0.0},
        train={**_ADAM, "learning_rate": 1e-3, "epochs": 60},
    ),
}
"""By name:

- "compact": narrow, four layers; for the generated dialogues on a CPU.
- "paper": what the talk says, and the code's sizes.
- "authors", "authors_meld": the published commands for IEMOCAP and for MELD. Their Adam has one learning rate
  throughout; the trainer's falls along a cosine. They keep the epoch that is best on the *test* data, which the trainer
  never looks at.
"""
