"""The losses of MMGCN: of the class of each utterance, and of the parameters.

Shape suffixes: b utterances, k classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_loss(logits_bk: Tensor, class_b: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean of −(1 − p)^γ log p, with p the probability of the class that holds (Lin et al., ICCV 2017).

    Args:
        logits_bk: (B, K) floating.
        class_b: (B,) int64.
        gamma: γ >= 0; 0 is the negative log-likelihood.
    """
    log_p_b = logits_bk.log_softmax(dim=1).gather(1, class_b[:, None]).squeeze(1)
    wrong_b = (-log_p_b.expm1()).clamp(min=torch.finfo(log_p_b.dtype).tiny)  # at 0 the slope of x^γ, γ < 1, is infinite
    return -(wrong_b**gamma * log_p_b).mean()


def authors_focal_loss(logits_bk: Tensor, class_b: Tensor, gamma: float = 2.5) -> Tensor:
    """What MMGCN's code calls focal loss and trains MELD with: −1/(B K) Σ_b Σ_k (1 − y_bk log p_bk)^γ log p_bk.

    Its log-probability stands where the focal loss has a probability, so that it weighs what is wrong more, not less,
    than without; and the sum is over all classes, so that those that do not hold are pulled up too.

    Args:
        logits_bk: (B, K) floating.
        class_b: (B,) int64.
        gamma: γ.
    """
    log_p_bk = logits_bk.log_softmax(dim=1)
    holds_bk = F.one_hot(class_b, logits_bk.shape[1])
    return -((1 - holds_bk * log_p_bk) ** gamma * log_p_bk).mean()


def class_weights(labels_nk: Tensor) -> Tensor:
    """(K,) float32: one over the share of the samples that have each class, 0 for a class without any.

    Args:
        labels_nk: (N, K) one-hot, N >= 1.
    """
    count_k = labels_nk.sum(dim=0, dtype=torch.float64)
    return torch.where(count_k > 0, len(labels_nk) / count_k.clamp(min=1), 0.0).float()


def parameter_penalty(parameters: Iterable[Tensor], form: Literal["norm", "squared"]) -> Tensor:
    """Scalar: ‖θ‖₂ of all parameters as one vector (the talk), or "squared", ‖θ‖²/2, whose gradient is θ.

    "squared" is what the weight decay of the code's Adam adds to the gradient. The gradient at θ = 0 is 0.
    """
    squared = torch.stack([parameter.square().sum() for parameter in parameters]).sum()
    if form == "squared":
        return squared / 2
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)
