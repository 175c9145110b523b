"""Training of the reference model: Algorithm 1, presets, checkpoints, evaluation.

run = mmer_fast.training.train("features.npz", "runs/mine", epochs=20)     # `api`, needs mmer_fast[train]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmer_fast.training.algorithm1 import Algorithm1, StepResult
from mmer_fast.training.config import PRESETS, TrainConfig, configs_from_json, configs_to_json, preset
from mmer_fast.training.fast_step import FastStep

if TYPE_CHECKING:
    from mmer_fast.training.api import Run, train

__all__ = [
    "PRESETS",
    "Algorithm1",
    "FastStep",
    "Run",
    "StepResult",
    "TrainConfig",
    "configs_from_json",
    "configs_to_json",
    "preset",
    "train",
]


def __getattr__(name: str) -> Any:
    """`Run` and `train`, imported when they are asked for: they need the packages of mmer_fast[train]."""
    if name in ("Run", "train"):
        from mmer_fast.training import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
