"""A case of the training step, and its inputs: a preset on random data in the shape of CMU-MOSEI.

A step clears the gradients, accumulates those of Eq. 15 and takes one step of AdamW, with learning rate 0: so every
contestant works on the same weights from the first turn to the last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mmer_fast.data import Batch
from mmer_fast.models import RobMMR, RobMMRConfig
from mmer_fast.training import TrainConfig, preset

STEP = "step"
MODALITIES = {"text": 300, "video": 35, "audio": 74}
LABELS, LONGEST, PADDING = 6, 60, 0.55
GAMMA = 0.1  # a perturbation that shows in the gradients


@dataclass(frozen=True)
class Case:
    """A step of a preset's network on `samples` samples, with the dropout that is given.

    `sizes` replaces fields of the model.
    """

    name: str
    preset: str
    samples: int
    dropout: float = 0.0
    sizes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Inputs:
    """A case on its device; the model is in training mode and shared by all contestants."""

    model: RobMMR
    config: TrainConfig
    batch: Batch

    @property
    def padding(self) -> float:
        """The share of padding in the batch."""
        return 1.0 - float(self.batch.lengths["text"].double().mean()) / LONGEST


def build(case: Case, device: str, seed: int = 0) -> Inputs:
    """The inputs of `case`: drawn on the CPU, so that every device gets the same numbers."""
    model_config, config = preset(case.preset)
    values: dict[str, object] = {"dropout": case.dropout, "attention_dropout": case.dropout, **dict(case.sizes)}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = RobMMR(MODALITIES, LABELS, _replaced(model_config, values))
        batch = _batch(case.samples)
    return Inputs(model.to(device).train(), replace(config, gamma=GAMMA), batch.to(device))


def _replaced(config: RobMMRConfig, values: dict[str, object]) -> RobMMRConfig:
    return replace(config, **values)  # type: ignore[arg-type]


def _batch(samples: int) -> Batch:
    """Aligned sequences of clipped log-normal lengths, one of them the longest; `PADDING` of the units is padding."""
    drawn = torch.exp(0.5 * torch.randn(samples))
    low, high = 0.0, float(LONGEST) * LONGEST
    while high - low > 1e-3:  # the scale that gives the share of padding
        scale = (low + high) / 2
        lengths = (scale * drawn).round().clamp(3, LONGEST).long()
        lengths[0] = LONGEST
        enough = float(lengths.double().mean()) >= (1 - PADDING) * LONGEST
        low, high = (low, scale) if enough else (scale, high)
    valid = torch.arange(LONGEST) < lengths[:, None]
    features = {name: torch.randn(samples, LONGEST, size) * valid[..., None] for name, size in MODALITIES.items()}
    labels = (torch.rand(samples, LABELS) < 0.3).float()
    return Batch(features, {name: lengths.clone() for name in MODALITIES}, labels, torch.arange(samples))
