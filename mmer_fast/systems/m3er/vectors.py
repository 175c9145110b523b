"""Padding out of the way of a layer that would read it.

Shape suffixes: b samples, t time steps, d features.
"""

from __future__ import annotations

from torch import Tensor

from mmer_fast.ops.lengths import length_mask


def without_padding(x_btd: Tensor, lengths_b: Tensor) -> Tensor:
    """(B, T, D) with 0 past the lengths (B,), whatever was there."""
    return x_btd.masked_fill(~length_mask(lengths_b, x_btd.shape[1])[..., None], 0.0)
