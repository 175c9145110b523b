"""Settings of the systems that adapt under a name.

No code of them is published: "authors" has the sizes of the talk's encoders, trained as those of MMIN are.
"""

from __future__ import annotations

from mmer_fast.systems.interface import Preset

_SMALL = {"dim": 64, "channels": 32, "fused_dim": 64}
_COMPACT = {"epochs": 20, "batch_size": 64, "learning_rate": 1e-3, "clip_norm": 1.0}
_AUTHORS = {"epochs": 80, "batch_size": 128, "learning_rate": 2e-4, "weight_decay": 0.0, "clip_norm": 1.0}

CROSS_CULTURE_PRESETS = {
    "compact": Preset(model=_SMALL, train=_COMPACT),
    "authors": Preset(train=_AUTHORS),
}
SEMI_SUPERVISED_PRESETS = {
    "compact": Preset(model={**_SMALL, "latent_dim": 32}, train=_COMPACT),
    "authors": Preset(train=_AUTHORS),
}
