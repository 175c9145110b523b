"""Losses of RobMMR: recognition (Eq. 2-3, 5 and the authors' asymmetric loss).

The consistency losses (Eq. 13) are `mmer_fast.bernoulli_kl_with_logits` and `softmax_kl_with_logits`.
All take logits, (B, K) floating, and return a scalar. Labels are (B, K) in {0, 1}, same dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def binary_cross_entropy(logits_bk: Tensor, labels_bk: Tensor) -> Tensor:
    """Mean over samples and labels of −y log y* − (1−y) log(1−y*), y* = σ(logits): RobMMR Eq. 2-3 and 5.

    (The paper prints Eq. 3 without the minus sign; it is minimised as above.)
    """
    return F.binary_cross_entropy_with_logits(logits_bk, labels_bk)


def asymmetric_loss(
    logits_bk: Tensor,
    labels_bk: Tensor,
    *,
    gamma_negative: float = 2.0,
    gamma_positive: float = 1.0,
    clip: float = 0.05,
    eps: float = 1e-5,
    scale: float = 1000.0,
) -> Tensor:
    """The asymmetric loss (Ridnik et al., 2021) with the constants of the RobMMR authors' code.

    With p = σ(logits) and q = min(1 − p + clip, 1):

        −scale/(B K) Σ [ y (1−p)^γ₊ log max(p, eps) + (1−y) (1−q)^γ₋ log max(q, eps) ]
    """
    positive = torch.sigmoid(logits_bk)
    negative = (torch.sigmoid(-logits_bk) + clip).clamp(max=1.0)
    likelihood = labels_bk * positive.clamp(min=eps).log() + (1 - labels_bk) * negative.clamp(min=eps).log()
    error = 1 - (labels_bk * positive + (1 - labels_bk) * negative)
    focus = error ** (gamma_positive * labels_bk + gamma_negative * (1 - labels_bk))
    return -scale * (likelihood * focus).mean()
