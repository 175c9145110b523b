"""Multi-head attention on packed tokens; the one place of the model that calls the attention operator.

Shape suffixes: n query tokens and m context tokens of all samples end to end, h heads, d width, e = d / h.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import mmer_fast as mf
from mmer_fast.models.linear import Linear, joint_linear, joint_parameters
from mmer_fast.ops.attention_checks import drawn_seed
from mmer_fast.ops.self_attention import self_attention


class Spans(NamedTuple):
    """Where each sample's tokens are: `cu_seqlens` (B + 1,) int32, and the length of the longest."""

    cu_seqlens: Tensor
    longest: int

    @classmethod
    def of(cls, layout: mf.PackedLayout) -> Spans:
        return cls(layout.cu_seqlens, layout.max_seqlen)

    @classmethod
    def equal(cls, samples: int, length: int, device: torch.device) -> Spans:
        """Samples of one length."""
        return cls(torch.arange(samples + 1, dtype=torch.int32, device=device) * length, length)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, tokens of each sample."""
        return self.cu_seqlens.long().diff()

    def places(self) -> tuple[Tensor, Tensor]:
        """The sample of each token and its place in it, each (N,) int64. On CUDA waits for the device."""
        sample_n = torch.arange(len(self.cu_seqlens) - 1, device=self.cu_seqlens.device).repeat_interleave(self.lengths)
        return sample_n, torch.arange(len(sample_n), device=sample_n.device) - self.cu_seqlens[sample_n]


class MultiHeadAttention(nn.Module):
    """Projections of query, key, value and output around `mmer_fast.packed_attention`.

    Args:
        dim: width d of inputs and output.
        heads: number of heads; divides `dim`.
        dropout: on the attention weights, in training.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = Linear(dim, dim)
        self.key = Linear(dim, dim)
        self.value = Linear(dim, dim)
        self.out = Linear(dim, dim)

    def forward(self, query_nd: Tensor, context_md: Tensor, queries: Spans, context: Spans) -> Tensor:
        """Each sample's queries (N, D) attend to its context (M, D); returns (N, D)."""
        return self.out(self.read(query_nd, context_md, queries, context))

    def read(self, query_nd: Tensor, context_md: Tensor, queries: Spans, context: Spans) -> Tensor:
        """What `out` is applied to, (N, D); 0 where a context is empty."""
        dropout = self.dropout if self.training else 0.0
        seed = drawn_seed(dropout, query_nd.device)
        if query_nd is context_md:
            weight, bias = joint_parameters((self.query, self.key, self.value))
            return self_attention(
                query_nd, weight, bias, self.heads, queries.cu_seqlens, queries.longest, dropout, seed
            )
        k_md, v_md = joint_linear(context_md, (self.key, self.value))
        out_nhe = mf.packed_attention(
            self._split(self.query(query_nd)),
            self._split(k_md),
            self._split(v_md),
            queries.cu_seqlens,
            context.cu_seqlens,
            max_seqlen_q=queries.longest,
            max_seqlen_k=context.longest,
            dropout_p=dropout,
            seed=seed,
        )
        assert isinstance(out_nhe, Tensor)
        return out_nhe.flatten(1)

    def _split(self, x_nd: Tensor) -> Tensor:
        return x_nd.unflatten(-1, (self.heads, -1))
