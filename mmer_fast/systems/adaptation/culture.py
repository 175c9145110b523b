"""The adversary of cross-culture training: which culture does a representation come from?

Shapes: B samples, D width, C cultures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmer_fast as mf
from mmer_fast.systems.utterance import perceptron

UNKNOWN = -1


class CultureClassifier(nn.Module):
    """A perceptron on a representation whose gradient is reversed (Ganin and Lempitsky, 2015).

    Minimising its loss trains it to tell cultures apart, and what is below to give it nothing to tell them apart by.

    Args:
        dim: D.
        cultures: C.
        hidden: width of its two hidden layers.
        scale: α, factor of the reversed gradient; with 0 it only watches.
    """

    def __init__(self, dim: int, cultures: int, hidden: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.layers = perceptron(dim, hidden, cultures)

    def forward(self, fused_bd: Tensor) -> Tensor:
        """Logits (B, C) of the representation (B, D)."""
        return self.layers(mf.grad_reverse(fused_bd, self.scale))


def culture_loss(logits_bc: Tensor, culture_b: Tensor) -> Tensor:
    """The mean cross-entropy of the samples whose culture is known.

    Args:
        logits_bc: (B, C).
        culture_b: (B,) integers from 0 to C - 1; `UNKNOWN` where there is none.

    Returns:
        A scalar; 0 where no culture is known.
    """
    losses_b = F.cross_entropy(logits_bc, culture_b.long(), ignore_index=UNKNOWN, reduction="none")
    return losses_b.sum() / torch.count_nonzero(culture_b != UNKNOWN).clamp(min=1)
