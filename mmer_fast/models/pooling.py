"""From the tokens of a sample to one vector, without a decoder.

Shape suffixes: n tokens of all samples, b batch, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmer_fast.models.attention import Spans


def token_means(x_nd: Tensor, spans: Spans) -> Tensor:
    """The mean (B, D) of each sample's tokens (N, D), 0 where it has none; float32 where the tokens are bfloat16."""
    x_nd = x_nd.float() if x_nd.dtype == torch.bfloat16 else x_nd
    return torch.segment_reduce(x_nd, "mean", lengths=spans.lengths, axis=0, unsafe=True, initial=0)
