"""UniVA's losses together, over the representations and logits of any network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mmer_fast.data import Split
from mmer_fast.models.losses import binary_cross_entropy
from mmer_fast.models.standardization import Standardization
from mmer_fast.systems.interface import Objective
from mmer_fast.systems.univa.config import UniVAConfig
from mmer_fast.systems.univa.contrastive import va_contrastive_loss
from mmer_fast.systems.univa.emotion_prior import (
    column_norm_prior,
    emotion_similarity,
    emotion_va,
    squared_difference_prior,
)
from mmer_fast.systems.univa.recognition import softmax_label_kl

VA = "va_"
LOSS_NAMES = ("recognition", "contrast", "prior")


class UniVAObjective(nn.Module):
    """The loss of a batch, with what belongs to it: scales of the VA scores, and M.

        L = (1 − α) (c · recognition + w η) + α Σ_m w_m L_m / M

    Without the contrastive loss it is c · recognition + w η. The slides give the two modules and not the sum; it is
    that of the published code.

    Args:
        modalities: names, M of them.
        labels: K.
        config: weights and switches; its sizes do not matter here.

    Raises:
        ValueError: the prior is on and `config.emotions` are not K, or `config.contrast_weights` names others.
    """

    similarity: Tensor

    def __init__(self, modalities: Sequence[str], labels: int, config: UniVAConfig) -> None:
        super().__init__()
        config.check_weights(modalities)
        self.config = config
        self.va_scaling = nn.ModuleDict({name: Standardization(2) for name in modalities})
        if config.prior == "none":
            return
        similarity_kk = label_similarity(labels, config)
        if config.trainable_similarity:
            self.similarity = nn.Parameter(similarity_kk)
        else:
            self.register_buffer("similarity", similarity_kk)

    def fit(self, split: Split) -> None:
        """Take the scales of the VA scores from the samples of a split that have the modality."""
        if not self.config.contrast or self.config.va_scaling == "none":
            return
        for name, scaling in self.va_scaling.items():
            va_n2 = split.extras[VA + name][split.lengths[name] > 0].astype(np.float64)
            if len(va_n2) < 2:
                continue
            mean_2, deviation_2 = va_n2.mean(axis=0), va_n2.std(axis=0, ddof=1)
            if self.config.va_scaling == "valence":
                mean_2, deviation_2 = np.full(2, mean_2[0]), np.full(2, deviation_2[0])
            assert isinstance(scaling, Standardization)
            scaling.fit(mean_2, deviation_2)

    def forward(
        self,
        logits_bk: Tensor,
        labels_bk: Tensor,
        hidden: Mapping[str, Tensor],
        va: Mapping[str, Tensor],
        lengths: Mapping[str, Tensor],
    ) -> Objective:
        """L and its parts, in the order of `LOSS_NAMES`.

        Args:
            logits_bk: (B, K) floating.
            labels_bk: (B, K) in {0, 1}.
            hidden: modality → H_m (B, D).
            va: modality → (B, 2) floating; may be empty where the contrastive loss is off.
            lengths: modality → (B,) integer; where it is 0, the sample takes no part in that modality's contrast.

        Raises:
            ValueError: the contrastive loss is on, and a modality has no VA scores.
        """
        config = self.config
        recognition = self.recognition(logits_bk, labels_bk)
        prior = self.prior(logits_bk)
        total = config.recognition_scale * recognition + config.prior_weight * prior
        contrast = logits_bk.new_zeros(())
        if config.contrast:
            contrast = self.contrast(hidden, va, lengths)
            total = (1 - config.alpha) * total + config.alpha * contrast
        parts = torch.stack([part.detach().float() for part in (recognition, contrast, prior)])
        return Objective(total, parts, logits_bk.detach())

    def recognition(self, logits_bk: Tensor, labels_bk: Tensor) -> Tensor:
        """(), without the factor c."""
        loss = softmax_label_kl if self.config.recognition == "softmax_kl" else binary_cross_entropy
        return loss(logits_bk, labels_bk)

    def prior(self, logits_bk: Tensor) -> Tensor:
        """η of the predictions, (); 0 where it is off."""
        if self.config.prior == "none":
            return logits_bk.new_zeros(())
        similarity_kk = self.similarity.to(torch.promote_types(logits_bk.dtype, torch.float32))
        softmax = self.config.recognition == "softmax_kl"
        if self.config.prior == "squared":
            predictions_bk = logits_bk.softmax(dim=1) if softmax else logits_bk.sigmoid()
            return squared_difference_prior(predictions_bk, similarity_kk)
        predictions_bk = logits_bk.log_softmax(dim=1) if softmax else logits_bk.sigmoid()
        return column_norm_prior(predictions_bk, similarity_kk)

    def contrast(self, hidden: Mapping[str, Tensor], va: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> Tensor:
        """Σ_m w_m L_m / M, (); arguments as in `forward`."""
        config, losses = self.config, []
        for name, scaling in self.va_scaling.items():
            if name not in va:
                raise ValueError(f"va must hold modality {name!r} for the contrastive loss, got {sorted(va)}")
            there_b = lengths[name] > 0
            loss = va_contrastive_loss(
                hidden[name][there_b],
                scaling(va[name][there_b]),
                temperature=config.temperature,
                distance=config.va_distance,
                normalize=config.normalize,
                views=config.views,
                reduction=config.contrast_reduction,
            )
            losses.append((config.contrast_weights or {}).get(name, 1.0) * loss)
        return torch.stack(losses).sum() / len(losses)


def label_similarity(labels: int, config: UniVAConfig) -> Tensor:
    """M of the prior, (K, K) float32.

    Raises:
        ValueError: `config.emotions` are not K, or have all one valence or one arousal.
    """
    names = config.emotion_names
    if len(names) != labels:
        raise ValueError(f"UniVAConfig.emotions must name the {labels} labels, got {len(names)}: {config.emotions}")
    return emotion_similarity(emotion_va(names, config.emotion_va)).float()
