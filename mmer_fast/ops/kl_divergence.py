"""Consistency losses between two predictions of many labels, from logits.

With p = sigma(p_logits), q = sigma(q_logits) and K labels of independent Bernoulli variables (RobMMR Eq. 13):

    KL(p || q) = sum_k p_k log(p_k/q_k) + (1 - p_k) log((1 - p_k)/(1 - q_k))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmer_fast.ops import _validate


def bernoulli_kl_with_logits(p_logits: Tensor, q_logits: Tensor, *, reduction: str = "batchmean") -> Tensor:
    """KL divergence of K Bernoulli variables, summed over the labels (RobMMR Eq. 13).

    Formed from log-sigmoids, so that neither it nor its gradient overflows or loses a small probability, whatever the
    size of the logits. Differentiable in both arguments; detach `p_logits` where it is the reference.

    Args:
        p_logits: ``(..., K)`` of the reference, float64, float32, bfloat16 or float16; finite.
        q_logits: ``(..., K)`` of the other prediction.
        reduction: ``"batchmean"`` (mean over samples), ``"sum"`` or ``"none"`` (one number a sample).

    Returns:
        ``()``, or ``(...)`` with ``"none"``; float32 for half types, which compute in it.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes differ or have no dimension of labels, or an unknown reduction.
    """
    p_logits, q_logits = _logits(p_logits, q_logits)
    p, rest = torch.sigmoid(p_logits), torch.sigmoid(-p_logits)
    positive = F.logsigmoid(p_logits) - F.logsigmoid(q_logits)
    negative = F.logsigmoid(-p_logits) - F.logsigmoid(-q_logits)
    divergence = (p * positive + rest * negative).sum(dim=-1)
    if reduction == "batchmean":
        return divergence.mean()
    return _reduced(divergence, reduction, "batchmean")


def softmax_kl_with_logits(p_logits: Tensor, q_logits: Tensor, *, reduction: str = "mean") -> Tensor:
    """KL divergence of softmaxes over the sigmoid *probabilities* of the labels, as the code published with RobMMR.

    Kept to reproduce that code. Probabilities lie within [0, 1], so both softmaxes are nearly uniform and the gradient
    is orders of magnitude below that of a recognition loss: `bernoulli_kl_with_logits` is what the paper says.

    Args:
        p_logits, q_logits: as in `bernoulli_kl_with_logits`.
        reduction: ``"mean"`` (over all samples and labels, as published), ``"sum"`` or ``"none"`` (``(..., K)``).

    Returns:
        ``()``, or ``(..., K)`` with ``"none"``; float32 for half types.

    Raises:
        TypeError, ValueError: as `bernoulli_kl_with_logits`.
    """
    p_logits, q_logits = _logits(p_logits, q_logits)
    log_p = torch.log_softmax(torch.sigmoid(p_logits), dim=-1)
    log_q = torch.log_softmax(torch.sigmoid(q_logits), dim=-1)
    divergence = log_p.exp() * (log_p - log_q)
    if reduction == "mean":
        return divergence.mean()
    return _reduced(divergence, reduction, "mean")


def _reduced(divergence: Tensor, reduction: str, mean: str) -> Tensor:
    if reduction == "sum":
        return divergence.sum()
    if reduction == "none":
        return divergence
    raise ValueError(f"reduction must be '{mean}', 'sum' or 'none', got {reduction!r}")


def _logits(p_logits: Tensor, q_logits: Tensor) -> tuple[Tensor, Tensor]:
    p_logits = _validate.floating_tensor("p_logits", p_logits)
    q_logits = _validate.floating_tensor("q_logits", q_logits)
    if p_logits.shape != q_logits.shape or p_logits.dim() == 0:
        raise ValueError(
            f"p_logits and q_logits must have one shape (..., K), got {tuple(p_logits.shape)} and "
            f"{tuple(q_logits.shape)}"
        )
    _validate.same_device("q_logits", q_logits, p_logits, "p_logits")
    dtype = torch.promote_types(torch.promote_types(p_logits.dtype, q_logits.dtype), torch.float32)
    return p_logits.to(dtype), q_logits.to(dtype)
