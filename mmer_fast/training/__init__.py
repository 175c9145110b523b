"""Training of the reference model: Algorithm 1, presets, checkpoints, evaluation."""

from mmer_fast.training.algorithm1 import Algorithm1, StepResult
from mmer_fast.training.config import PRESETS, TrainConfig, configs_from_json, configs_to_json, preset

__all__ = [
    "PRESETS",
    "Algorithm1",
    "StepResult",
    "TrainConfig",
    "configs_from_json",
    "configs_to_json",
    "preset",
]
