"""Small data, models and configurations for the training tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from mmer_fast.data import MultiModalData, make_synthetic
from mmer_fast.models import RobMMR, RobMMRConfig
from mmer_fast.training import TrainConfig
from mmer_fast.training.run import RunConfig, describe_data, train_run

MODEL = RobMMRConfig(dim=16, ffn_dim=24, heads=2, unimodal_blocks=1, multimodal_blocks=1)
TRAIN = TrainConfig(
    learning_rate=3e-3, epochs=2, batch_size=8, warmup=2, log_every=2, checkpoint_every=1, clip_norm=1.0
)


def small_data(**sizes: int) -> MultiModalData:
    """Synthetic data with audio and video only; 30 training samples make four batches, the last one short."""
    counts = {"n_train": 30, "n_valid": 12, "n_test": 20, "max_length": 10, **sizes}
    return make_synthetic(3, **counts).select(["audio", "video"])


def run_config(data: MultiModalData, model: RobMMRConfig = MODEL, **changes: Any) -> RunConfig:
    return RunConfig(model, dataclasses.replace(TRAIN, **changes), describe_data(data))


def small_model(data: MultiModalData, config: RobMMRConfig = MODEL, seed: int = 0) -> RobMMR:
    torch.manual_seed(seed)
    return RobMMR(data.modalities, len(data.label_names), config)


class Silent:
    """An observer that only counts."""

    def __init__(self) -> None:
        self.steps = 0
        self.records: list[dict[str, Any]] = []

    def on_step(self, epoch: int, step: int, samples: int, result: object) -> None:
        self.steps += 1

    def on_epoch(self, record: dict[str, Any]) -> None:
        self.records.append(record)


class StopAt(Silent):
    """Raises KeyboardInterrupt after a number of steps, as a signal would."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.last = steps

    def on_step(self, *arguments: Any) -> None:
        super().on_step(*arguments)
        if self.steps == self.last:
            raise KeyboardInterrupt


def train(
    directory: Path,
    observer: Silent,
    model: RobMMRConfig = MODEL,
    *,
    device: str | torch.device = "cpu",
    **changes: Any,
) -> dict[str, Any]:
    data = small_data()
    directory.mkdir(exist_ok=True)
    return train_run(run_config(data, model, **changes), data, directory, torch.device(device), observer)
