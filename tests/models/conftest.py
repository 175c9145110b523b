"""A ragged batch for the small model."""

from __future__ import annotations

import pytest
import torch
from small_robmmr import MODALITIES
from torch import Tensor


@pytest.fixture
def batch() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Features and lengths of four samples, one lacking frames and one lacking everything; labels."""
    generator = torch.Generator().manual_seed(1)
    lengths = {"words": torch.tensor([6, 3, 5, 0]), "frames": torch.tensor([2, 4, 0, 0])}
    features = {}
    for name, size in MODALITIES.items():
        longest = int(lengths[name].max())
        x_btf = torch.randn(4, longest, size, dtype=torch.float64, generator=generator)
        padding_bt = torch.arange(longest) >= lengths[name][:, None]
        features[name] = x_btf.masked_fill(padding_bt[..., None], 0.0)
    labels = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 1]], dtype=torch.float64)
    return features, lengths, labels
