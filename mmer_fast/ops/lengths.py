"""Which positions of padded rows count."""

from __future__ import annotations

import torch
from torch import Tensor


def length_mask(lengths: Tensor, n: int) -> Tensor:
    """(..., n) bool, True at the first ``lengths[...]`` positions of each row; `lengths` (...) integers."""
    return torch.arange(n, device=lengths.device) < lengths[..., None]
