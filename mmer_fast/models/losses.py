"""Losses of RobMMR: recognition (Eq. 2-3, 5 and the authors' asymmetric loss) and consistency (Eq. 13).

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


def bernoulli_kl(target_bk: Tensor, logits_bk: Tensor) -> Tensor:
    """KL(p ‖ p̃) of K independent Bernoulli variables, summed over labels, mean over samples: RobMMR Eq. 13.

    p = σ(target), p̃ = σ(logits). Σ_k p log(p/p̃) + (1−p) log((1−p)/(1−p̃)), from log-sigmoids, so it is
    finite and has a correct gradient for logits of any size.
    """
    p_bk = torch.sigmoid(target_bk)
    positive = F.logsigmoid(target_bk) - F.logsigmoid(logits_bk)
    negative = F.logsigmoid(-target_bk) - F.logsigmoid(-logits_bk)
    return (p_bk * positive + torch.sigmoid(-target_bk) * negative).sum(dim=-1).mean()


def softmax_kl(target_bk: Tensor, logits_bk: Tensor) -> Tensor:
    """KL of softmaxes *over the sigmoid probabilities* across labels, mean over all B K entries: the authors'
    code.

    It is kept to reproduce that code. Probabilities lie within [0, 1], so both softmaxes are nearly uniform
    and the gradient is orders of magnitude below that of the recognition loss.
    """
    target = torch.softmax(torch.sigmoid(target_bk), dim=-1)
    log_perturbed = torch.log_softmax(torch.sigmoid(logits_bk), dim=-1)
    return F.kl_div(log_perturbed, target, reduction="none").mean()
