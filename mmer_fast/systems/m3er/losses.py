"""The multiplicative fusion loss, original (Liu et al. 2018) and as M3ER changes it.

Shapes: M modalities, B samples, K labels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def multiplicative_loss(
    logits_mbk: Tensor,
    labels_bk: Tensor,
    present_bm: Tensor | None = None,
    *,
    beta: float = 1.0,
    form: Literal["original", "modified"] = "modified",
    weight: Literal["own", "others"] = "own",
    detach_weights: bool = False,
) -> Tensor:
    """The loss c of every label of every sample.

    With p_i the probability that modality i gives to the true side of a label, and γ = β/(M − 1) for the M modalities
    of a sample:

        original    c = − Σ_i Π_{j≠i} (1 − p_j)^γ log p_i    a modality counts less where the others are right already
        modified    c = − Σ_i w_i^γ log p_i                  a modality counts less where it is wrong

    The slides print w_i = p_j and leave j free: it is i itself ("own"), or p_j stands for Π_{j≠i} p_j as in the
    original ("others").

    Args:
        logits_mbk: (M, B, K) floating, of each modality.
        labels_bk: (B, K) in {0, 1}.
        present_bm: (B, M) bool, the modalities that count; None: all. What the logits of others are does not matter.
            Of a single modality c is −log p. Of none it is 0.
        beta: β ≥ 0; 0 leaves a plain sum of cross-entropies.
        form: "original" or "modified".
        weight: w of the modified form, "own" or "others".
        detach_weights: take the weights as numbers. Otherwise the gradient passes through them too: in the modified
            form it then *lowers* an "own" p_i below e^(−1/γ), and with "others" every p_j by the terms of the rest.

    Returns:
        c, (B, K).

    Raises:
        ValueError: a shape, a range or a name is wrong.
    """
    _check(logits_mbk, labels_bk, present_bm, beta, form, weight)
    if present_bm is None:
        present_bm = labels_bk.new_ones(len(labels_bk), len(logits_mbk), dtype=torch.bool)
    present_mb1 = present_bm.T[..., None]
    true_mbk = torch.where(labels_bk > 0.5, logits_mbk, -logits_mbk).masked_fill(~present_mb1, 0.0)
    log_p_mbk = F.logsigmoid(true_mbk)
    if form == "original":
        log_weight_mbk = _sum_of_others(F.logsigmoid(-true_mbk), present_mb1)
    elif weight == "others":
        log_weight_mbk = _sum_of_others(log_p_mbk, present_mb1)
    else:
        log_weight_mbk = log_p_mbk
    others_b1 = present_bm.sum(dim=1, keepdim=True) - 1
    gamma_b1 = torch.where(others_b1 > 0, beta / others_b1.clamp(min=1), 0.0).to(logits_mbk.dtype)
    if detach_weights:
        log_weight_mbk = log_weight_mbk.detach()
    c_mbk = -(gamma_b1 * log_weight_mbk).exp() * log_p_mbk
    return c_mbk.masked_fill(~present_mb1, 0.0).sum(dim=0)


def _sum_of_others(x_mbk: Tensor, present_mb1: Tensor) -> Tensor:
    """Σ_{j≠i} x_j over the modalities that are present."""
    x_mbk = x_mbk.masked_fill(~present_mb1, 0.0)
    others_mm = 1 - torch.eye(len(x_mbk), dtype=x_mbk.dtype, device=x_mbk.device)
    return torch.einsum("ij,jbk->ibk", others_mm, x_mbk)


def _check(
    logits_mbk: Tensor, labels_bk: Tensor, present_bm: Tensor | None, beta: float, form: str, weight: str
) -> None:
    if logits_mbk.dim() != 3 or not logits_mbk.is_floating_point() or len(logits_mbk) == 0:
        got = f"{logits_mbk.dtype} of shape {tuple(logits_mbk.shape)}"
        raise ValueError(f"logits must be floating of shape (M >= 1, B, K), got {got}")
    if labels_bk.shape != logits_mbk.shape[1:]:
        raise ValueError(f"labels must have shape {tuple(logits_mbk.shape[1:])}, got {tuple(labels_bk.shape)}")
    expected = (logits_mbk.shape[1], len(logits_mbk))
    if present_bm is not None and (present_bm.dtype != torch.bool or present_bm.shape != expected):
        got = f"{present_bm.dtype} of shape {tuple(present_bm.shape)}"
        raise ValueError(f"present must be bool of shape {expected}, got {got}")
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, got {beta}")
    for name, value, options in (("form", form, ("original", "modified")), ("weight", weight, ("own", "others"))):
        if value not in options:
            raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")
