"""What the logits of a model mean: independent labels, or classes of which one holds.

Shapes: N samples, K labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """From logits to probabilities, and from these to predictions.

    Attributes:
        activation: "sigmoid" (each label by itself) or "softmax" (the labels share one).
        decision: "threshold" (every label whose probability exceeds it) or "argmax" (the one most probable).
    """

    activation: Literal["sigmoid", "softmax"]
    decision: Literal["threshold", "argmax"]

    def probabilities(self, logits_nk: Tensor) -> Tensor:
        """(N, K) in [0, 1]."""
        return logits_nk.sigmoid() if self.activation == "sigmoid" else logits_nk.softmax(dim=1)

    def predictions(self, probabilities_nk: Tensor, threshold: float) -> Tensor:
        """(N, K) bool."""
        if self.decision == "threshold":
            return probabilities_nk > threshold
        k = probabilities_nk.shape[1]
        return F.one_hot(probabilities_nk.argmax(dim=1), k).to(torch.bool)


LABELS = Outputs("sigmoid", "threshold")
"""Any number of labels may hold."""
CLASSES = Outputs("softmax", "argmax")
"""Exactly one holds."""
