"""Transformer encoder and decoder stacks: post-norm, ReLU, a LayerNorm at the end of each stack.

Shape suffixes: b batch, t time, q queries, s memory positions, d width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmer_fast.models.attention import MultiHeadAttention
from mmer_fast.models.dropout import Dropout


class FeedForward(nn.Sequential):
    """Linear, ReLU, dropout, Linear."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), Dropout(dropout), nn.Linear(hidden, dim))


class EncoderBlock(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm."""

    def __init__(self, dim: int, hidden: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(dim, heads, attention_dropout)
        self.attention_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, hidden, dropout)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
        x_btd = self.attention_norm(x_btd + self.dropout(self.attention(x_btd, x_btd, valid_bt)))
        return self.feed_forward_norm(x_btd + self.dropout(self.feed_forward(x_btd)))


class Encoder(nn.Module):
    """A stack of `EncoderBlock`s; positions that are not valid come out as 0."""

    def __init__(
        self, blocks: int, dim: int, hidden: int, heads: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EncoderBlock(dim, hidden, heads, dropout, attention_dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
        """Encode `x_btd` (B, T, D), finite everywhere; `valid_bt` (B, T) bool or None. Returns (B, T, D)."""
        for block in self.blocks:
            x_btd = block(x_btd, valid_bt)
        x_btd = self.norm(x_btd)
        return x_btd if valid_bt is None else x_btd.masked_fill(~valid_bt[..., None], 0.0)


class DecoderBlock(nn.Module):
    """Self-attention of the queries, attention to the memory, feed-forward; each with residual and
    LayerNorm.
    """

    def __init__(self, dim: int, hidden: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(dim, heads, attention_dropout)
        self.self_attention_norm = nn.LayerNorm(dim)
        self.cross_attention = MultiHeadAttention(dim, heads, attention_dropout)
        self.cross_attention_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, hidden, dropout)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x_bqd: Tensor, memory_bsd: Tensor, valid_bs: Tensor | None) -> Tensor:
        x_bqd = self.self_attention_norm(x_bqd + self.dropout(self.self_attention(x_bqd, x_bqd)))
        read_bqd = self.cross_attention(x_bqd, memory_bsd, valid_bs)
        x_bqd = self.cross_attention_norm(x_bqd + self.dropout(read_bqd))
        return self.feed_forward_norm(x_bqd + self.dropout(self.feed_forward(x_bqd)))


class Decoder(nn.Module):
    """A stack of `DecoderBlock`s over learnable queries, one a label.

    Args:
        queries: number of learnable queries K.
    """

    def __init__(
        self,
        queries: int,
        blocks: int,
        dim: int,
        hidden: int,
        heads: int,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, dim))
        self.blocks = nn.ModuleList(DecoderBlock(dim, hidden, heads, dropout, attention_dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)

    def forward(self, memory_bsd: Tensor, valid_bs: Tensor | None) -> Tensor:
        """Read the memory (B, S, D) with every query; returns (B, K, D)."""
        x_bqd = self.queries.expand(memory_bsd.shape[0], -1, -1)
        for block in self.blocks:
            x_bqd = block(x_bqd, memory_bsd, valid_bs)
        return self.norm(x_bqd)


def sinusoidal_positions(length: int, dim: int, like: Tensor) -> Tensor:
    """(length, dim) sines and cosines of Vaswani et al. 2017, section 3.5, in the dtype and on the device of
    `like`.
    """
    rate = torch.exp(torch.arange(0, dim, 2, device=like.device) * (-math.log(10000.0) / dim))
    angle = torch.arange(length, device=like.device)[:, None] * rate
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).to(like.dtype)
