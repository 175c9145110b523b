"""What the attention kernels take: tensors with their strides, and the checks that need no kernel.

The records are passed to kernels as they are: Triton specialises on their None pointers and constants, so that an
option that is not used costs nothing. One may hold others only before constants of its own: Triton 3.6 forgets a
stride of 1, which it takes for a constant, in a record inside another one without.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from mmer_fast.ops.philox import dropout_scale, dropped_steps

LOG2_E = math.log2(math.e)
WIDTH_LIMIT = 128
BLOCK_LIMIT = 256  # tokens of the largest block
CHUNK = 32  # columns of float32 rows that enter a product at a time


class Array(NamedTuple):
    """An array over samples, heads and tokens with its strides; entries of a token are neighbours. Packed: batch 0."""

    ptr: Any
    batch: int
    head: int
    token: int


class Bias(NamedTuple):
    """b over samples, heads, queries and keys; stride 0 where it is broadcast."""

    ptr: Any
    batch: int
    head: int
    query: int
    key: int


class Samples(NamedTuple):
    """Where the tokens of a sample lie: by `cu_seqlens` (packed), or `longest` each, of which `lengths` count."""

    cu_seqlens: Any  # [B + 1] int32 or None
    lengths: Any  # [B] int64 or None
    longest: int


class Dropout(NamedTuple):
    """Entries drawn below `dropped` are dropped, the others take `factor` (`mmer_fast.ops.philox`)."""

    seed: Any  # [1] int64, or None without dropout
    dropped: int  # q 2^16
    factor: float


class Inputs(NamedTuple):
    """What the forward and the backward kernels share."""

    q: Array  # [B, H, L, D], packed [Tq, H, D]
    k: Array  # [B, Hk, S, D], packed [Tk, Hk, D]
    v: Array
    weights: Array  # m: [B, H, S], packed [Tk, H]
    mask: Array  # [B, S] bytes
    bias: Bias
    queries: Samples
    keys: Samples
    heads: int
    key_heads: int
    scale: float
    dropout: Dropout
    CAUSAL: tl.constexpr
    WIDTH: tl.constexpr
    BLOCK_D: tl.constexpr
    CHUNK: tl.constexpr  # columns of a row that enter a product at a time


class Statistics(NamedTuple):
    """What the backward kernels know of each query."""

    lse: Any  # [B, H, L], packed [Tq, H], contiguous: in base 2, +inf for a query without a key, whose e are then 0
    delta: Any  # as lse: sum_d do o - dL/dlse


def unsupported(width: int) -> str | None:
    """Why heads of `width` cannot be served, or None."""
    return None if width <= WIDTH_LIMIT else f"expected heads of at most {WIDTH_LIMIT} entries, got {width}"


def token_array(x: Tensor, packed: bool) -> Array:
    """x (B, H, L, D), packed (T, H, D): a copy where D has another stride than 1."""
    x = near(x, 0 if packed else 2)
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return Array(x, 0, x.stride(1), x.stride(0)) if packed else Array(x, *x.stride()[:3])


def near(x: Tensor, *dims: int) -> Tensor:
    """x: a copy where a block's entries lie too far apart, along one of `dims`, for offsets of 32 bits."""
    return x.contiguous() if any(x.stride(dim) >= 2**31 // (2 * BLOCK_LIMIT) for dim in dims) else x


def inputs_of(
    q: Tensor, k: Tensor, v: Tensor, key_weights: Tensor | None, mask: Tensor | None, bias: Tensor | None,
    lengths: Tensor | None, query_lengths: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    max_queries: int, max_keys: int, causal: bool, scale: float, dropout_p: float, seed: Tensor | None,
) -> Inputs:  # fmt: skip
    """The operator's arguments, in its order, as kernels take them."""
    packed = cu_seqlens_q is not None
    width = q.shape[-1]
    block = max(16, triton.next_power_of_2(width))
    if (reason := unsupported(width)) is not None:
        raise ValueError(reason)
    return Inputs(
        q=token_array(q, packed),
        k=token_array(k, packed),
        v=token_array(v, packed),
        weights=_weights(key_weights, packed),
        mask=_mask(mask),
        bias=_bias(bias),
        queries=Samples(_vector(cu_seqlens_q), _vector(query_lengths), max_queries),
        keys=Samples(_vector(cu_seqlens_k), _vector(lengths), max_keys),
        heads=q.shape[1],
        key_heads=k.shape[1],
        scale=scale,
        dropout=_dropout(dropout_p, seed),
        CAUSAL=tl.constexpr(bool(causal)),
        WIDTH=tl.constexpr(width),
        BLOCK_D=tl.constexpr(block),
        CHUNK=tl.constexpr(min(block, CHUNK) if q.dtype == torch.float32 else block),
    )


def _vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _weights(m: Tensor | None, packed: bool) -> Array:
    if m is None:
        return Array(None, 0, 0, 0)
    m = near(m, 0 if packed else -1)
    per_head = m.dim() == (2 if packed else 3)
    if packed:
        return Array(m, 0, m.stride(1) if per_head else 0, m.stride(0))
    return Array(m, m.stride(0), m.stride(1) if per_head else 0, m.stride(-1))


def _mask(mask: Tensor | None) -> Array:
    if mask is None:
        return Array(None, 0, 0, 0)
    mask = near(mask, 1).view(torch.uint8)
    return Array(mask, mask.stride(0), 0, mask.stride(1))


def _bias(bias: Tensor | None) -> Bias:
    if bias is None:
        return Bias(None, 0, 0, 0, 0)
    bias = near(bias, 2, 3)
    strides = (0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True))
    return Bias(bias, *strides)


def _dropout(dropout_p: float, seed: Tensor | None) -> Dropout:
    if dropout_p == 0:
        return Dropout(None, 0, 1.0)
    return Dropout(seed, dropped_steps(dropout_p), dropout_scale(dropout_p))
