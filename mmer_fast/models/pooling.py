"""From the tokens of a sample to one vector, without a decoder.

Shape suffixes: n tokens of all samples, b batch, t time, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmer_fast.models.attention import Spans
from mmer_fast.ops.lengths import length_mask


def token_means(x_nd: Tensor, spans: Spans) -> Tensor:
    """The mean (B, D) of each sample's tokens (N, D), 0 where it has none; float32 where the tokens are bfloat16."""
    x_nd = x_nd.float() if x_nd.dtype == torch.bfloat16 else x_nd
    return torch.segment_reduce(x_nd, "mean", lengths=spans.lengths, axis=0, unsafe=True, initial=0)


def padded_means(x_btd: Tensor, lengths_b: Tensor) -> Tensor:
    """The mean (B, D) of the first `lengths_b` units of padded rows (B, T, D), 0 where there is none.

    What the padding holds does not matter, NaN included.
    """
    valid_bt1 = length_mask(lengths_b, x_btd.shape[1])[..., None]
    return x_btd.masked_fill(~valid_bt1, 0.0).sum(dim=1) / lengths_b.clamp(min=1)[:, None]
