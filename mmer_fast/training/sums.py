"""What an epoch adds up over its steps: losses and label counts."""

from __future__ import annotations

import torch
from torch import Tensor

from mmer_fast.training.algorithm1 import LOSSES, StepResult


class EpochSums:
    """Sums over the steps of an epoch, on the device: losses weighted by samples, and label counts.

    `losses` (3,) float64: L_r, L_m, L_p. `counts` (4,) int64: true positives, false positives, false
    negatives, samples.
    """

    def __init__(self, device: torch.device) -> None:
        self.losses = torch.zeros(3, dtype=torch.float64, device=device)
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)

    def add(self, result: StepResult, labels_bk: Tensor, threshold: float) -> None:
        predicted_bk = result.logits.sigmoid() > threshold
        true_bk = labels_bk.bool()
        pairs = (predicted_bk & true_bk, predicted_bk & ~true_bk, ~predicted_bk & true_bk)
        samples = len(labels_bk)
        self.losses += result.losses.double() * samples
        self.counts += torch.stack([pair.sum() for pair in pairs] + [self.counts.new_tensor(samples)])

    def summary(self) -> dict[str, float]:
        """Mean losses, and the micro-F1 of the predictions made while training (dropout on, weights
        moving).
        """
        hit, false, missed, samples = self.counts.tolist()
        means = dict(zip(LOSSES, (self.losses / samples).tolist(), strict=True))
        return {**means, "micro_f1": 2 * hit / max(2 * hit + false + missed, 1)}
