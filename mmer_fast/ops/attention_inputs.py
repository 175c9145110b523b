"""What attention's operators take, on every backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def wide_dtype(q: Tensor) -> torch.dtype:
    """Of lse, the key weights, the bias and their gradients."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


class Inputs(NamedTuple):
    """What the forward pass takes, in the order of the schema. Packed: with cu_seqlens; else padded.

    Attributes:
        q: (B, H, L, D) or packed (Tq, H, D), floating point.
        k, v: (B, Hk, S, D) or packed (Tk, Hk, D).
        key_weights: (B, S) or (B, H, S), packed (Tk,) or (Tk, H); float32, float64 beside float64 q.
        mask: (B, S) bool; padded only.
        bias: (1|B, 1|H, 1|L, S); float32, float64 beside float64 q.
        lengths, query_lengths: (B,) int64; padded only.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, both or neither.
        max_queries, max_keys: L and S of the longest sample.
        seed: int64 of one element, on the device of q; None where dropout_p is 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_weights: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    lengths: Tensor | None
    query_lengths: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_queries: int
    max_keys: int
    causal: bool
    scale: float
    dropout_p: float
    seed: Tensor | None
    exact_zero_weight_grad: bool

    @property
    def wide(self) -> torch.dtype:
        """`wide_dtype` of q."""
        return wide_dtype(self.q)

    def weights_of_each_head(self) -> Tensor:
        """The key weights as (B, H, S), packed (Tk, H): heads that share weights share memory."""
        m, heads = self.key_weights, self.q.shape[1]
        assert m is not None
        shared = m.dim() == (1 if self.cu_seqlens_q is not None else 2)
        return m.unsqueeze(1).expand(-1, heads, *m.shape[1:]) if shared else m
