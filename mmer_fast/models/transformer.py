"""Transformer encoder and decoder stacks: post-norm, ReLU, a LayerNorm at the end of each stack.

They work on the tokens of all samples end to end, so that no layer computes padding. What is neither a matrix product
nor attention is fused around them: the bias of a linear layer is added where its output is read next.

Shape suffixes: n tokens of all samples, q label queries of all samples, b batch, d width, h hidden width.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from mmer_fast.models.attention import MultiHeadAttention, Spans
from mmer_fast.models.dropout import Dropout
from mmer_fast.models.linear import Linear
from mmer_fast.ops.dropout import relu_dropout
from mmer_fast.ops.dropout_add_layer_norm import dropout_add_layer_norm


class FeedForward(nn.Sequential):
    """Linear, ReLU, dropout, Linear; ReLU and dropout run as one."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__(Linear(dim, hidden), nn.ReLU(), Dropout(dropout), Linear(hidden, dim))

    def forward(self, x_nd: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        return self.out(self.hidden(x_nd))

    @property
    def out(self) -> Linear:
        """The last layer."""
        return cast(Linear, self[3])

    def hidden(self, x_nd: Tensor) -> Tensor:
        """What `out` reads, (N, H)."""
        rise, dropout = cast(Linear, self[0]), cast(Dropout, self[2])
        return relu_dropout(rise.without_bias(x_nd), rise.bias, dropout.rate)


def add_norm(x_nd: Tensor, branch_nh: Tensor, out: Linear, dropout: Dropout, norm: nn.LayerNorm) -> Tensor:
    """``norm(x + dropout(out(branch)))``: the end of a branch (N, H), of which `out` is the last layer; (N, D)."""
    product_nd = out.without_bias(branch_nh)
    return dropout_add_layer_norm(product_nd, out.bias, x_nd, norm.weight, norm.bias, norm.eps, dropout.rate)


class EncoderBlock(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm."""

    def __init__(self, dim: int, hidden: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(dim, heads, attention_dropout)
        self.attention_norm = nn.LayerNorm(dim)
        self.feed_forward = FeedForward(dim, hidden, dropout)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x_nd: Tensor, spans: Spans) -> Tensor:
        read_nd = self.attention.read(x_nd, x_nd, spans, spans)
        x_nd = add_norm(x_nd, read_nd, self.attention.out, self.dropout, self.attention_norm)
        hidden_nh = self.feed_forward.hidden(x_nd)
        return add_norm(x_nd, hidden_nh, self.feed_forward.out, self.dropout, self.feed_forward_norm)


class Encoder(nn.Module):
    """A stack of `EncoderBlock`s."""

    def __init__(
        self, blocks: int, dim: int, hidden: int, heads: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EncoderBlock(dim, hidden, heads, dropout, attention_dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_nd: Tensor, spans: Spans) -> Tensor:
        """Encode the tokens (N, D) of all samples; returns (N, D)."""
        for block in self.blocks:
            x_nd = block(x_nd, spans)
        return self.norm(x_nd)


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

    def forward(self, x_qd: Tensor, memory_nd: Tensor, queries: Spans, memory: Spans) -> Tensor:
        read_qd = self.self_attention.read(x_qd, x_qd, queries, queries)
        x_qd = add_norm(x_qd, read_qd, self.self_attention.out, self.dropout, self.self_attention_norm)
        read_qd = self.cross_attention.read(x_qd, memory_nd, queries, memory)
        x_qd = add_norm(x_qd, read_qd, self.cross_attention.out, self.dropout, self.cross_attention_norm)
        hidden_qh = self.feed_forward.hidden(x_qd)
        return add_norm(x_qd, hidden_qh, self.feed_forward.out, self.dropout, self.feed_forward_norm)


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

    def forward(self, memory_nd: Tensor, memory: Spans) -> Tensor:
        """Read each sample's memory, (N, D) in all, with every query; returns (B, K, D)."""
        samples, labels = memory.cu_seqlens.shape[0] - 1, self.queries.shape[0]
        queries = Spans.equal(samples, labels, memory_nd.device)
        x_qd = self.queries.repeat(samples, 1)
        for block in self.blocks:
            x_qd = block(x_qd, memory_nd, queries, memory)
        return self.norm(x_qd).unflatten(0, (samples, labels))


def sinusoidal_positions(time_n: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """(N, dim) sines and cosines of Vaswani et al. 2017, section 3.5, of the places (N,) of tokens."""
    rate = torch.exp(torch.arange(0, dim, 2, device=time_n.device) * (-math.log(10000.0) / dim))
    angle = time_n[:, None] * rate
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).to(dtype)
