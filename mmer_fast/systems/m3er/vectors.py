"""The feature vector f_i of a modality, which M3ER's slides check and regenerate, where features are sequences.

Shape suffixes: b samples, t time steps, d features.
"""

from __future__ import annotations

from torch import Tensor

from mmer_fast.ops.lengths import length_mask


def without_padding(x_btd: Tensor, lengths_b: Tensor) -> Tensor:
    """(B, T, D) with 0 past the lengths (B,), whatever was there."""
    return x_btd.masked_fill(~length_mask(lengths_b, x_btd.shape[1])[..., None], 0.0)


def mean_over_time(x_btd: Tensor, lengths_b: Tensor) -> Tensor:
    """(B, D), the mean of the steps before the lengths (B,); 0 for a sample without a step."""
    return without_padding(x_btd, lengths_b).sum(dim=1) / lengths_b.clamp(min=1)[:, None]
