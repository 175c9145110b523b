"""Sequences as one vector a sample, for classifiers of vectors: mean and deviation of every feature over time.

Shape suffixes: b samples, t time, f features of a modality, p pooled features of all modalities.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmer_fast.data import Split
from mmer_fast.data.statistics import feature_statistics
from mmer_fast.models.standardization import Standardization
from mmer_fast.ops.lengths import length_mask


class Pooling(nn.Module):
    """Standardise every feature, then take its mean and its standard deviation over a sample's units; in float64.

    Args:
        modalities: modality → F.
    """

    def __init__(self, modalities: Mapping[str, int]) -> None:
        super().__init__()
        self.standardization = nn.ModuleDict(
            {name: Standardization(size).double() for name, size in modalities.items()}
        )

    def fit(self, split: Split) -> None:
        """Take the scale of the features from the training split."""
        for name, module in self.standardization.items():
            assert isinstance(module, Standardization)
            module.fit(*feature_statistics(split.features[name], split.lengths[name]))

    def forward(self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> Tensor:
        """(B, P), P = 2 Σ F: for each modality the means, then the deviations; 0 where a sample lacks it.

        Args:
            features: modality → (B, T, F), floating; what the padding holds does not matter.
            lengths: modality → (B,) integers, 0 to T.
        """
        pooled = [self._pool(module, features[name], lengths[name]) for name, module in self.standardization.items()]
        return torch.cat(pooled, dim=1)

    def _pool(self, standardize: nn.Module, x_btf: Tensor, lengths_b: Tensor) -> Tensor:
        """(B, 2 F)."""
        valid_bt1 = length_mask(lengths_b, x_btf.shape[1])[..., None]
        count_b1 = lengths_b.clamp(min=1)[:, None]
        x_btf = standardize(x_btf.double()).masked_fill(~valid_bt1, 0.0)
        mean_bf = x_btf.sum(dim=1) / count_b1
        distance_btf = (x_btf - mean_bf[:, None]).masked_fill(~valid_bt1, 0.0)
        deviation_bf = (distance_btf.square().sum(dim=1) / count_b1).sqrt()
        return torch.cat([mean_bf, deviation_bf], dim=1)
