"""TAILOR's adversarial refinement: what modalities have in common, and what is each one's own.

Shapes: B samples, M modalities, T time, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmer_fast as mf


class ModalityDiscriminator(nn.Sequential):
    """Which modality a vector comes from: linear, ReLU, linear; (..., D) to logits (..., M)."""

    def __init__(self, dim: int, modalities: int) -> None:
        super().__init__(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, modalities))


def adversarial_loss(
    discriminator: nn.Module, common: Tensor, private: Tensor, present: Tensor, reversal_scale: float = 1.0
) -> Tensor:
    """The discriminator learns modalities from both representations; the common one learns to leave it nothing.

        L = mean over (i, m) present of [ CE(D(R(c_im)), m) + CE(D(p_im), m) ]

    R is the identity whose gradient is reversed (`mmer_fast.grad_reverse`), CE the cross-entropy of a softmax over the
    M modalities. So one minimum over all parameters plays min over D, max over what makes c; p is *not* reversed:
    it keeps what tells modalities apart.

    Args:
        discriminator: D, (..., D) to logits (..., M).
        common, private: c and p, (B, M, D), floating.
        present: (B, M) bool, which modalities a sample has.
        reversal_scale: at least 0, factor of the reversed gradient.

    Returns:
        Scalar; 0 where nothing is present.
    """
    target_bm = torch.arange(common.shape[1], device=common.device).expand(common.shape[:2])
    logits_bmm = [discriminator(mf.grad_reverse(common, reversal_scale)), discriminator(private)]
    loss_bm = sum(F.cross_entropy(x.flatten(0, 1), target_bm.flatten(), reduction="none") for x in logits_bmm)
    assert isinstance(loss_bm, Tensor)
    present_n = present.flatten()
    return torch.where(present_n, loss_bm, 0.0).sum() / present_n.sum().clamp(min=1)


def orthogonal_loss(common: Tensor, private: Tensor, lengths: Tensor) -> Tensor:
    """What a modality's two representations share: mean over samples of ‖Cᵀ P‖_F² / T, with T the sample's own length.

    Computed from the two Gram matrices, ‖Cᵀ P‖_F² = Σ_ts (C Cᵀ)_ts (P Pᵀ)_ts: (T, T) instead of (D, D).

    Args:
        common, private: C and P, (B, T, D), floating, 0 in the padding.
        lengths: (B,) integers, 0 to T; a sample of length 0 counts as 0.

    Returns:
        Scalar.
    """
    gram_btt = common @ common.transpose(1, 2)
    shared_b = (gram_btt * (private @ private.transpose(1, 2))).sum(dim=(1, 2))
    return (shared_b / lengths.clamp(min=1)).mean()
