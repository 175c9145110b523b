"""Sequences as one vector a sample, for classifiers of vectors: mean and deviation of every feature over time.

Shape suffixes: b samples, t time, f features of a modality, p pooled features of all modalities.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mmer_fast.data import Split
from mmer_fast.data.large_arrays import blocks
from mmer_fast.data.statistics import feature_statistics
from mmer_fast.models.standardization import Standardization
from mmer_fast.ops.lengths import length_mask


class Pooling(nn.Module):
    """Standardise every feature, then take its mean and its standard deviation over a sample's units; in float64.

    A sample that lacks a modality has there what the training samples that have it have on average: zeros would be an
    extreme, since no sequence has a deviation of 0.

    Args:
        modalities: modality → F.
    """

    def __init__(self, modalities: Mapping[str, int]) -> None:
        super().__init__()
        self.modalities = nn.ModuleDict({name: _ModalityPooling(size) for name, size in modalities.items()})

    def fit(self, split: Split) -> None:
        """Take scales and averages from the training split."""
        for name, module in self.modalities.items():
            assert isinstance(module, _ModalityPooling)
            module.fit(split.features[name], split.lengths[name])

    def forward(self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> Tensor:
        """(B, P), P = 2 Σ F: for each modality the means, then the deviations.

        Args:
            features: modality → (B, T, F), floating; what the padding holds does not matter.
            lengths: modality → (B,) integers, 0 to T.
        """
        return torch.cat([module(features[name], lengths[name]) for name, module in self.modalities.items()], dim=1)


class _ModalityPooling(nn.Module):
    """`Pooling` of one modality; `average` (2 F) stands for it where it is missing."""

    average: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.standardization = Standardization(features).double()
        self.register_buffer("average", torch.zeros(2 * features, dtype=torch.float64))

    def fit(self, features_ntf: np.ndarray, lengths_n: np.ndarray) -> None:
        self.standardization.fit(*feature_statistics(features_ntf, lengths_n))
        total_p, present = torch.zeros_like(self.average), max(1, int((lengths_n > 0).sum()))
        for block in blocks(features_ntf):
            lengths_b = torch.tensor(lengths_n[block], device=total_p.device)
            pooled_bp = self._pool(torch.tensor(features_ntf[block], device=total_p.device), lengths_b)
            total_p += pooled_bp[lengths_b > 0].sum(dim=0)
        self.average.copy_(total_p / present)

    def forward(self, x_btf: Tensor, lengths_b: Tensor) -> Tensor:
        """(B, 2 F)."""
        return torch.where(lengths_b[:, None] > 0, self._pool(x_btf, lengths_b), self.average)

    def _pool(self, x_btf: Tensor, lengths_b: Tensor) -> Tensor:
        """(B, 2 F), 0 where there is no unit."""
        valid_bt1 = length_mask(lengths_b, x_btf.shape[1])[..., None]
        count_b1 = lengths_b.clamp(min=1)[:, None]
        x_btf = self.standardization(x_btf.double()).masked_fill(~valid_bt1, 0.0)
        mean_bf = x_btf.sum(dim=1) / count_b1
        distance_btf = (x_btf - mean_bf[:, None]).masked_fill(~valid_bt1, 0.0)
        deviation_bf = (distance_btf.square().sum(dim=1) / count_b1).sqrt()
        return torch.cat([mean_bf, deviation_bf], dim=1)
