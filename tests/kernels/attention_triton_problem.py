"""A problem for the Triton attention, with its float64 reference: what `test_attention_triton.py` checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmer_fast.ops.attention_reference import attention
from mmer_fast.triton import attention as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = math.inf

# Error in units of the largest entry, at least 1: float32 sums of about a hundred terms.
TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 4e-6


@dataclass
class Problem:
    """Padded tensors with everything that the operator takes; `packed` has the kernels see them packed."""

    q: Tensor  # [B, H, L, D]
    k: Tensor  # [B, Hk, S, D]
    v: Tensor
    key_weights: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    lengths: Tensor | None = None
    query_lengths: Tensor | None = None
    causal: bool = False
    dropout_p: float = 0.0
    seed: int = 20240229
    exact: bool = False
    packed: bool = False
    grad: Tensor = field(init=False)
    grad_lse: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        self.grad = torch.randn(self.q.shape).to(self.q.dtype)
        self.grad_lse = torch.randn(self.q.shape[:-1])

    def arguments(self) -> tuple[Any, ...]:
        q, k, v, m = self.q, self.k, self.v, self.key_weights
        queries, keys, starts = q.shape[2], k.shape[2], (None, None)
        if self.packed:
            q, k, v = self.pack(q, True), self.pack(k, False), self.pack(v, False)
            m = None if m is None else self.pack(m, False) if m.dim() == 3 else self.pack(m[:, None], False)[:, 0]
            starts = tuple(
                torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
                for lengths in (self.query_lengths, self.lengths)
            )
        seed = torch.tensor([self.seed]) if self.dropout_p > 0 else None
        arguments = (
            q, k, v, m, self.mask, self.bias, None if self.packed else self.lengths,
            None if self.packed else self.query_lengths, *starts, queries, keys, self.causal, q.shape[-1] ** -0.5,
            self.dropout_p, seed, self.exact,
        )  # fmt: skip
        return to_device(arguments)

    def pack(self, x: Tensor, of_queries: bool) -> Tensor:
        """[B, H, T, ...] to [sum of lengths, H, ...]."""
        lengths = self.query_lengths if of_queries else self.lengths
        return torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths.tolist())])

    def unpack(self, x: Tensor, of_queries: bool, fill: float = 0.0) -> Tensor:
        lengths = self.query_lengths if of_queries else self.lengths
        longest = self.q.shape[2] if of_queries else self.k.shape[2]
        padded = torch.full((len(lengths), x.shape[1], longest, *x.shape[2:]), fill, dtype=x.dtype)
        for b, part in enumerate(x.split(lengths.tolist())):
            padded[b, :, : len(part)] = part.transpose(0, 1)
        return padded

    def forward(self) -> tuple[Tensor, Tensor]:
        return tuple(x.cpu() for x in kernels.attention_forward(*self.arguments()))

    def backward(self, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        grad, grad_lse = self.grad, self.grad_lse
        if self.packed:
            grad, grad_lse = self.pack(grad, True), self.pack(grad_lse, True)
        wanted = (self.key_weights is not None, self.bias is not None)
        given = to_device((grad, grad_lse, out, lse))
        return tuple(x.cpu() for x in kernels.attention_backward(*given, *self.arguments(), *wanted))

    def reference(self) -> tuple[Tensor, ...]:
        """out, lse and the gradients of q, k, v, m (each head's own) and b in float64."""
        m = self.key_weights
        if m is not None and m.dim() == 2:
            m = m[:, None].expand(-1, self.q.shape[1], -1)
        given = (self.q, self.k, self.v, m, self.bias)
        leaves = [None if x is None else x.double().clone().requires_grad_() for x in given]
        out, lse = attention(
            *leaves[:4], bias=leaves[4], mask=self.mask, lengths=self.lengths, query_lengths=self.query_lengths,
            causal=self.causal, dropout_p=self.dropout_p, seed=self.seed % 2**64, exact_zero_weight_grad=self.exact,
        )  # fmt: skip
        padding = torch.zeros(lse.shape, dtype=torch.bool)
        if self.query_lengths is not None:
            padding |= torch.arange(lse.shape[-1]) >= self.query_lengths[:, None, None]
        loss = (out * self.grad.double().masked_fill(padding[..., None], 0.0)).sum()
        if self.grad_lse is not None:
            loss = loss + (lse.masked_fill(lse == -INF, 0.0) * self.grad_lse.masked_fill(padding, 0.0)).sum()
        wanted = [x for x in leaves if x is not None]
        gradients = iter(torch.autograd.grad(loss, wanted))
        return out.detach(), lse.detach(), *(None if x is None else next(gradients) for x in leaves)

    def run(self) -> tuple[Tensor, ...]:
        """What the kernels give, in the order and layout of `reference`."""
        out, lse = self.forward()
        assert out.dtype == self.q.dtype
        assert lse.dtype == torch.float32
        assert out.is_contiguous()
        assert lse.is_contiguous()
        q, k, v, m, b = self.backward(out, lse)
        assert q.dtype == k.dtype == v.dtype == self.q.dtype
        assert m.dtype == b.dtype == torch.float32
        if self.packed:
            out, q, lse = self.unpack(out, True), self.unpack(q, True), self.unpack(lse, True, -INF)
            k, v = self.unpack(k, False), self.unpack(v, False)
            m = self.unpack(m, False) if self.key_weights is not None else m
        return out, lse, q, k, v, m, b


def to_device(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.to(DEVICE) if isinstance(value, Tensor) else value for value in values)


def distance(got: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest expected entry, at least 1."""
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    size = max(1.0, float(expected.abs().max()))
    return float((got.double() - expected).abs().nan_to_num(INF).max()) / size


def check(problem: Problem, rounding: float = 1.0, overflows: tuple[int, ...] = ()) -> None:
    """Beside the reference, but the gradients (of q, k, v, m, b) that `overflows` counts.

    `rounding`: times the usual errors of gradients, where a log-sum-exp is far from 0.
    """
    got, expected = problem.run(), problem.reference()
    assert distance(got[0], expected[0]) <= TOLERANCE
    empty = expected[1] == -INF
    assert torch.equal(got[1] == -INF, empty)
    assert distance(got[1].masked_fill(empty, 0.0), expected[1].masked_fill(empty, 0.0)) <= TOLERANCE
    for i, (gradient, wanted) in enumerate(zip(got[2:], expected[2:], strict=True)):
        if wanted is None:
            assert gradient.shape == (0,)
        elif i not in overflows:
            assert distance(gradient, wanted) <= GRADIENT_TOLERANCE * rounding


def tensors(
    queries: int, keys: int, width: int = 16, batch: int = 2, heads: int = 2, key_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    key_heads = heads if key_heads is None else key_heads
    shapes = [(batch, heads, queries, width), (batch, key_heads, keys, width), (batch, key_heads, keys, width)]
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def weights(*shape: int) -> Tensor:
    """In [0.1, 1], a quarter of them 0."""
    return (0.1 + 0.9 * torch.rand(shape)).masked_fill(torch.rand(shape) < 0.25, 0.0)
