"""Features on one scale: (x − μ)/σ, feature by feature, with μ and σ of the training data.

Feature sets mix units: a pitch in Hz beside a ratio below 1. The linear layer that reads them starts with weights of
one size for all of them, so the small ones would hardly be seen. A unit masked to 0 is then the average unit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mmer_fast.data import Split
from mmer_fast.data.statistics import feature_statistics


class Standardization(nn.Module):
    """(x − μ)/σ for one modality; x itself until `fit` (`mmer_fast.data.statistics` has μ and σ).

    μ and σ are buffers: they are saved with the weights.

    Args:
        features: number of features F.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def forward(self, x_btf: Tensor) -> Tensor:
        """(..., F) floating; same shape and dtype."""
        return (x_btf - self.mean.to(x_btf.dtype)) * self.scale.to(x_btf.dtype)

    def fit(self, mean_f: np.ndarray, deviation_f: np.ndarray) -> None:
        """Take μ and σ, (F,); a feature whose σ is 0 is left on its scale."""
        varies_f = deviation_f > 0
        scale_f = np.where(varies_f, 1.0 / np.where(varies_f, deviation_f, 1.0), 1.0)
        self.mean.copy_(torch.from_numpy(mean_f))
        self.scale.copy_(torch.from_numpy(scale_f))


def fit_standardization(layers: nn.ModuleDict, split: Split) -> None:
    """Fit the `Standardization` of each modality to the features of a training split.

    Args:
        layers: modality → its `Standardization`.
        split: has these modalities.
    """
    for name, layer in layers.items():
        assert isinstance(layer, Standardization)
        layer.fit(*feature_statistics(split.features[name], split.lengths[name]))
