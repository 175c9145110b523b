"""UniVA's contrastive loss of one modality: samples whose valence and arousal are close attract each other.

The scores of all pairs are never held at once, let alone products of all pairs (B, B, D): a block of anchors after the
other is compared with everything, and the backward pass computes the scores again from what it keeps, one number an
anchor. Memory grows with B instead of B², for one more product of matrices.

Shape suffixes: b anchors, n samples they are compared with, r anchors of a block, d width.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmer_fast.ops import _validate

REDUCTIONS = ("sum", "mean", "none")


def va_contrastive_loss(
    features: Tensor,
    va: Tensor,
    contrast: Tensor | None = None,
    contrast_va: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.7,
    distance: float = 0.1,
    normalize: bool = True,
    views: Literal[1, 2] = 1,
    reduction: Literal["sum", "mean", "none"] = "sum",
    block_rows: int = 256,
) -> Tensor:
    """The contrastive loss (Zheng et al. 2024, module 2 of the slides).

    With anchors h_i, scores s_ij = h_i · h_j / τ, the positives P(i) of anchor i within a VA distance, and A(i) all
    that it is compared with:

        L = Σ_i L_i,    L_i = −1/|P(i)| Σ_{p ∈ P(i)} log ( exp(s_ip) / Σ_{a ∈ A(i)} exp(s_ia) )

    An anchor without a positive counts 0.

    Differentiable once, exactly, in `features`, `contrast` and `temperature`; samples without the modality must be left
    out by the caller.

    Args:
        features: (B, D) anchors, float64, float32, bfloat16 or float16 (which compute in float32).
        va: (B, 2) valence and arousal of each, floating; no gradient.
        contrast: (N, D) other samples (a memory, another view) that the anchors are compared with; None: the anchors
            themselves, each without itself.
        contrast_va: (N, 2) of these; given if and only if `contrast` is.
        temperature: τ > 0, a number or a scalar tensor.
        distance: samples whose valence and arousal are closer than this are positives (slides and published code: 0.1).
        normalize: compare directions, with features of length 1 (the published code does not).
        views: 1 compares with every other sample (slides). 2 is the published code: every sample is there twice, with
            the same features, and the copy of the anchor is one of its positives. Needs `contrast` None.
        reduction: "sum" over the anchors (slides), "mean" over those that have a positive (with two views all of them,
            as published), or "none".
        block_rows: anchors compared at a time; memory is a few times `block_rows` N numbers.

    Returns:
        (), or (B,) with "none".

    Raises:
        TypeError: a tensor is not floating.
        ValueError: a shape, option or number is not as above.
    """
    own = _check(features, va, contrast, contrast_va, views, reduction, block_rows)
    _validate.number("distance", distance, minimum=0.0, maximum=math.inf)
    if not isinstance(temperature, Tensor):
        _validate.number("temperature", temperature, above=0.0)
    anchors_bd = _prepared(features, normalize)
    others_nd = anchors_bd if contrast is None else _prepared(contrast, normalize).to(anchors_bd.dtype)
    others_va_n2 = va if contrast_va is None else contrast_va
    loss_b, has_positive_b = _BlockedLoss.apply(
        anchors_bd / temperature, others_nd, va.detach(), others_va_n2.detach(), distance, own, block_rows
    )
    if views == 2:  # with every sample there twice, the sum in the normaliser is twice this one
        loss_b = loss_b + math.log(2)
    if reduction == "none":
        return loss_b
    return loss_b.sum() if reduction == "sum" else loss_b.sum() / has_positive_b.sum().clamp(min=1)


class _BlockedLoss(torch.autograd.Function):
    """(L_i (B,), has a positive (B,) bool) of scores q kᵀ, block after block of the rows of q.

    `own` is the weight of an anchor among what it is compared with, where all others have 1: 0 leaves it out, ½ says
    that all others are there twice; None where it is not among them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_bd: Tensor,
        k_nd: Tensor,
        q_va_b2: Tensor,
        k_va_n2: Tensor,
        distance: float,
        own: float | None,
        block_rows: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.options = (distance, own, block_rows)
        loss_b, normalizer_b, count_b = (q_bd.new_empty(len(q_bd)) for _ in range(3))
        for rows in _blocks(len(q_bd), block_rows):
            scores_rn, weights_rn = _compare(q_bd, k_nd, q_va_b2, k_va_n2, rows, distance, own)
            count_b[rows] = weights_rn.sum(dim=1)
            attracted_r = weights_rn.mul_(scores_rn).sum(dim=1)
            if own is not None:
                scores_rn.diagonal(rows.start).add_(math.log(own) if own else -math.inf)
            normalizer_b[rows] = scores_rn.logsumexp(dim=1)
            loss_b[rows] = normalizer_b[rows] - attracted_r / count_b[rows]
        has_positive_b = count_b > 0
        # exp(s − ∞) = 0: an anchor without a positive gives no gradient.
        normalizer_b.masked_fill_(~has_positive_b, math.inf)
        ctx.save_for_backward(q_bd, k_nd, q_va_b2, k_va_n2, normalizer_b, count_b)
        ctx.mark_non_differentiable(has_positive_b)
        return loss_b.masked_fill_(~has_positive_b, 0.0), has_positive_b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_b: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_bd, k_nd, q_va_b2, k_va_n2, normalizer_b, count_b = ctx.saved_tensors
        distance, own, block_rows = ctx.options
        grad_q_bd, grad_k_nd = torch.empty_like(q_bd), torch.zeros_like(k_nd)
        share_b = torch.where(count_b > 0, 1 / count_b, 0.0)
        for rows in _blocks(len(q_bd), block_rows):
            scores_rn, weights_rn = _compare(q_bd, k_nd, q_va_b2, k_va_n2, rows, distance, own)
            grad_rn = scores_rn.sub_(normalizer_b[rows, None]).exp_()
            if own is not None:
                grad_rn.diagonal(rows.start).mul_(own)
            grad_rn.sub_(weights_rn.mul_(share_b[rows, None])).mul_(grad_b[rows, None])
            with torch.autocast(q_bd.device.type, enabled=False):
                grad_q_bd[rows] = grad_rn @ k_nd
                grad_k_nd.addmm_(grad_rn.T, q_bd[rows])
        return grad_q_bd, grad_k_nd, None, None, None, None, None


def _compare(
    q_bd: Tensor,
    k_nd: Tensor,
    q_va_b2: Tensor,
    k_va_n2: Tensor,
    rows: slice,
    distance: float,
    own: float | None,
) -> tuple[Tensor, Tensor]:
    """Scores (R, N) of the anchors `rows`, and weights (R, N): 1 at the positives, 0 elsewhere, `own` at themselves."""
    with torch.autocast(q_bd.device.type, enabled=False):
        scores_rn = q_bd[rows] @ k_nd.T
    squared_rn = (q_va_b2[rows, :1] - k_va_n2[:, 0]).square_()
    squared_rn += (q_va_b2[rows, 1:] - k_va_n2[:, 1]).square_()
    weights_rn = (squared_rn.sqrt_() < distance).to(scores_rn.dtype)
    if own is not None:
        weights_rn.diagonal(rows.start).fill_(own)
    return scores_rn, weights_rn


def _blocks(count: int, block_rows: int) -> list[slice]:
    return [slice(start, min(start + block_rows, count)) for start in range(0, count, block_rows)]


def _prepared(features: Tensor, normalize: bool) -> Tensor:
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(features, dim=1) if normalize else features


def _check(
    features: Tensor,
    va: Tensor,
    contrast: Tensor | None,
    contrast_va: Tensor | None,
    views: int,
    reduction: str,
    block_rows: int,
) -> float | None:
    """Refuses what does not fit together; returns the weight of an anchor among what it is compared with."""
    _check_pair("features", features, "va", va)
    if (contrast is None) != (contrast_va is None):
        raise ValueError("contrast and contrast_va must be given together, got one of them")
    if contrast is not None and contrast_va is not None:
        _check_pair("contrast", contrast, "contrast_va", contrast_va)
        if contrast.shape[1] != features.shape[1]:
            raise ValueError(f"contrast must have the width {features.shape[1]} of features, got {contrast.shape[1]}")
    if views not in (1, 2) or (views == 2 and contrast is not None):
        raise ValueError(f"views must be 1, or 2 without contrast, got {views}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    if contrast is not None:
        return None
    return 0.0 if views == 1 else 0.5


def _check_pair(name: str, features: Tensor, va_name: str, va: Tensor) -> None:
    _validate.floating_tensor(name, features)
    _validate.floating_tensor(va_name, va)
    if features.dim() != 2:
        raise ValueError(f"{name} must have shape (B, D), got {tuple(features.shape)}")
    if va.shape != (len(features), 2):
        raise ValueError(f"{va_name} must have shape ({len(features)}, 2), got {tuple(va.shape)}")
