"""Sequences as one vector a sample, for classifiers of vectors: mean and deviation of every feature over time.

Shape suffixes: n samples, t time, f features of a modality, p pooled features of all modalities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mmer_fast.data import DataError, Split
from mmer_fast.data.padding import blocks
from mmer_fast.data.statistics import feature_statistics


@dataclass(frozen=True)
class Pooling:
    """Standardise every feature, then take its mean and its standard deviation over a sample's units.

    Attributes:
        mean, deviation: modality → (F,) float64, of the training data; a feature of deviation 0 keeps its scale.
    """

    mean: Mapping[str, np.ndarray]
    deviation: Mapping[str, np.ndarray]

    @classmethod
    def fit(cls, split: Split) -> Pooling:
        """Of a training split."""
        statistics = {name: feature_statistics(split.features[name], split.lengths[name]) for name in split.features}
        return cls({name: pair[0] for name, pair in statistics.items()}, {n: pair[1] for n, pair in statistics.items()})

    @property
    def modalities(self) -> dict[str, int]:
        """Modality → F."""
        return {name: len(mean_f) for name, mean_f in self.mean.items()}

    def __call__(self, split: Split) -> np.ndarray:
        """(N, P) float64, P = 2 Σ F: for each modality the means, then the deviations; 0 where a sample lacks it.

        Raises:
            DataError: the split has other modalities or feature sizes.
        """
        sizes = {name: x.shape[2] for name, x in split.features.items()}
        if sizes != self.modalities:
            raise DataError(f"features: expected the modalities {self.modalities}; got {sizes}")
        return np.concatenate([self._pool(split, name) for name in self.mean], axis=1)

    def _pool(self, split: Split, name: str) -> np.ndarray:
        """(N, 2 F)."""
        features_ntf, lengths_n = split.features[name], split.lengths[name]
        scale_f = np.where(self.deviation[name] > 0, self.deviation[name], 1.0)
        pooled_np = np.zeros((len(split), 2 * len(scale_f)))
        for block in blocks(features_ntf):
            x_ntf = (features_ntf[block].astype(np.float64) - self.mean[name]) / scale_f
            counts_nt = np.arange(x_ntf.shape[1]) < lengths_n[block, None]
            share_nt1 = (counts_nt / np.maximum(lengths_n[block, None], 1))[..., None]
            mean_nf = (x_ntf * share_nt1).sum(axis=1)
            variance_nf = ((x_ntf - mean_nf[:, None]) ** 2 * share_nt1).sum(axis=1)
            pooled_np[block] = np.concatenate([mean_nf, np.sqrt(variance_nf)], axis=1)
        return pooled_np
