"""What an epoch adds up over its steps: losses and label counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmer_fast.models.outputs import Outputs
from mmer_fast.training.algorithm1 import StepResult


class EpochSums:
    """Sums over the steps of an epoch, on the device: losses weighted by samples, and label counts.

    `losses` (P,) float64: those that a step names. `counts` (4,) int64: true positives, false positives, false
    negatives, samples.

    Args:
        names: of the P losses of a step.
        outputs: what the logits of a step mean.
        device: of the results.
    """

    def __init__(self, names: Sequence[str], outputs: Outputs, device: torch.device) -> None:
        self.names, self.outputs = tuple(names), outputs
        self.losses = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)

    def add(self, result: StepResult, labels_bk: Tensor, threshold: float) -> None:
        predicted_bk = self.outputs.predictions(self.outputs.probabilities(result.logits), threshold)
        true_bk = labels_bk.bool()
        pairs = (predicted_bk & true_bk, predicted_bk & ~true_bk, ~predicted_bk & true_bk)
        samples = len(labels_bk)
        self.losses += result.losses.double() * samples
        self.counts[:3] += torch.stack([pair.sum() for pair in pairs])
        self.counts[3] += samples

    def clear(self) -> None:
        """Begin the next epoch."""
        self.losses.zero_()
        self.counts.zero_()

    def summary(self) -> dict[str, float]:
        """Mean losses, and the micro-F1 of the predictions made while training (dropout on, weights
        moving).
        """
        hit, false, missed, samples = self.counts.tolist()
        means = dict(zip(self.names, (self.losses / samples).tolist(), strict=True))
        return {**means, "micro_f1": 2 * hit / max(2 * hit + false + missed, 1)}
