"""Multi-head attention with key padding; the one place of the model that calls an attention kernel.

Shape suffixes: b batch, l queries, s keys, h heads, d width, e = d / h.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def masked_attention(
    query_bhle: Tensor,
    key_bhse: Tensor,
    value_bhse: Tensor,
    valid_bs: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention over the valid keys; a sample without any key yields 0.

    Args:
        query_bhle: (B, H, L, E), floating.
        key_bhse, value_bhse: (B, H, S, E), dtype of the query, finite (padding too).
        valid_bs: (B, S) bool, True at the keys that count; None counts all.
        dropout: probability with which attention weights are dropped.

    Returns:
        (B, H, L, E): softmax(query keyᵀ / √E) value over the valid keys.
    """
    if valid_bs is None:
        return F.scaled_dot_product_attention(query_bhle, key_bhse, value_bhse, dropout_p=dropout)
    # A softmax over no key is 0/0 on some kernels: such a sample attends to its padding, and the result is
    # discarded.
    empty_b = ~valid_bs.any(dim=-1)
    attended_bs = valid_bs | empty_b[:, None]
    out_bhle = F.scaled_dot_product_attention(
        query_bhle, key_bhse, value_bhse, attn_mask=attended_bs[:, None, None, :], dropout_p=dropout
    )
    return out_bhle.masked_fill(empty_b[:, None, None, None], 0.0)


class MultiHeadAttention(nn.Module):
    """Projections of query, key, value and output around `masked_attention`.

    Args:
        dim: width d of inputs and output.
        heads: number of heads; divides `dim`.
        dropout: on the attention weights, in training.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, query_bld: Tensor, context_bsd: Tensor, valid_bs: Tensor | None = None) -> Tensor:
        """Attend from `query_bld` (B, L, D) to `context_bsd` (B, S, D); returns (B, L, D)."""
        out_bhle = masked_attention(
            self._split(self.query(query_bld)),
            self._split(self.key(context_bsd)),
            self._split(self.value(context_bsd)),
            valid_bs,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.out(out_bhle.transpose(1, 2).flatten(2))

    def _split(self, x_btd: Tensor) -> Tensor:
        return x_btd.unflatten(-1, (self.heads, -1)).transpose(1, 2)
