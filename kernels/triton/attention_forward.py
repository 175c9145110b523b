"""Forward attention: kernel and launcher. See attention.py.

    x_j <- x_j + log2 m_j,   top' = max(top, max_j x_j),   p_j = 2^(x_j - top')
    sum <- sum 2^(top - top') + sum_j p_j,   o <- o 2^(top - top') + sum_j p_j v_j

over blocks of keys (online softmax); at the end o / sum, and lse = (top + log2 sum) / log2(e). Dropout takes its
entries from p in o alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .attention_arguments import inputs_of
from .attention_blocks import (
    LOG2E,
    kept,
    load_key_exponents,
    load_rows,
    narrow,
    product,
    row_products,
    rows_at,
    rows_of,
    sample_of,
    scores,
    store_rows,
)
from .attention_tiles import tile_for


@triton.jit(do_not_specialize=["blocks"])
def attention_forward_kernel(inputs, out_ptr, lse_ptr, blocks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """o and lse of BLOCK_M queries of one head."""
    i_program = tl.program_id(0)
    i_start = (i_program % blocks) * BLOCK_M
    b, h = i_program // blocks // inputs.heads, i_program // blocks % inputs.heads
    g = h * inputs.key_heads // inputs.heads
    first, count, room = sample_of(inputs.queries, b)
    key_first, key_count, _ = sample_of(inputs.keys, b)
    if i_start >= room:
        return
    i_rows, i_cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m_queries, m_room = i_start + i_rows < count, i_start + i_rows < room
    q_rows = rows_at(inputs.q, b, h, first + i_start)
    b_q = load_rows(q_rows, m_queries, inputs.WIDTH, inputs.BLOCK_D)

    # No key counts for a block of padding; none beyond the diagonal for a block under the causal rule.
    end = tl.where(i_start < count, key_count, 0)
    if inputs.CAUSAL:
        end = tl.minimum(end, i_start + BLOCK_M)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, inputs.BLOCK_D], tl.float32)
    for i_first in range(0, end, BLOCK_N):
        b_exponent, m_keys = load_key_exponents(inputs, b, h, key_first, i_first, key_count, BLOCK_N)
        k_rows = rows_at(inputs.k, b, g, key_first + i_first)
        b_k = load_rows(k_rows, m_keys, inputs.WIDTH, inputs.BLOCK_D)
        # As m_queries, but of the turn, so that what it loads is read again and not held in registers.
        m_here = i_start + i_rows < tl.where(i_first < end, count, 0)
        b_qk = row_products(inputs, q_rows, m_here, b_q, k_rows, m_keys, b_k)
        b_x = scores(
            inputs, b, h, b_qk, i_start, i_first, i_rows[:, None], i_cols[None, :],
            m_queries[:, None], m_keys[None, :], b_exponent[None, :],
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(b_x, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # no key yet: any will do
        b_p = tl.exp2(b_x - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(b_p, axis=1)
        if inputs.dropout.seed is not None:
            b_p = tl.where(kept(inputs.dropout, b, h, i_start, i_first, BLOCK_M, BLOCK_N), b_p, 0.0)
        b_v = load_rows(rows_at(inputs.v, b, g, key_first + i_first), m_keys, inputs.WIDTH, inputs.BLOCK_D)
        b_o = product(narrow(b_p, b_v.dtype), b_v, b_o * shrink[:, None])
        top = higher

    m_any = m_queries & (total != 0)  # a NaN counts
    divisor = tl.where(m_any, total, 1.0)
    b_o = tl.where(m_any[:, None], b_o / divisor[:, None] * inputs.dropout.factor, 0.0)
    lse = tl.where(m_any, (top + tl.log2(divisor)) / LOG2E, float("-inf"))
    row, step = rows_of(inputs.queries, first, i_start, b, h, inputs.heads)
    store_rows(out_ptr, row, step, m_room, b_o, inputs.WIDTH, inputs.BLOCK_D)
    tl.store(lse_ptr + row + i_rows * step, lse, mask=m_room)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, key_weights: Tensor | None, mask: Tensor | None, bias: Tensor | None,
    lengths: Tensor | None, query_lengths: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    max_queries: int, max_keys: int, causal: bool, scale: float, dropout_p: float, seed: Tensor | None,
    exact_zero_weight_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp.

    Args:
        q: ``[B, H, L, D]``, packed ``[Tq, H, D]``, float32, bfloat16 or float16, any strides.
        k, v: ``[B, Hk, S, D]``, packed ``[Tk, Hk, D]``; key head ``h Hk // H`` serves query head h.
        key_weights: m, ``[B, S]`` or ``[B, H, S]`` float32, packed ``[Tk]`` or ``[Tk, H]``; 0 excludes a key.
        mask: ``[B, S]`` bool, True where a key counts; padded only.
        bias: ``[1|B, 1|H, 1|L, S]`` float32, any strides; L and S of the longest sample.
        lengths, query_lengths: ``[B]`` int64, the keys and queries that count; padded only.
        cu_seqlens_q, cu_seqlens_k: ``[B + 1]`` int32, both or neither; packed.
        max_queries, max_keys: tokens of the longest sample; padded L and S.
        seed: ``[1]`` int64, None where dropout_p is 0.
        exact_zero_weight_grad: changes the backward pass alone.

    Returns:
        ``(out, lse)``, contiguous: out as q; lse ``[B, H, L]``, packed ``[Tq, H]``, float32, natural logarithm.
    """
    inputs = inputs_of(
        q, k, v, key_weights, mask, bias, lengths, query_lengths, cu_seqlens_q, cu_seqlens_k, max_queries, max_keys,
        causal, scale, dropout_p, seed,
    )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    tile = tile_for("forward", q.dtype, q.shape[-1], max_queries, max_keys)
    blocks = triton.cdiv(max_queries, tile.queries)
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    with torch.cuda.device_of(q):
        attention_forward_kernel[(batch * inputs.heads * blocks,)](
            inputs, out, lse, blocks, BLOCK_M=tile.queries, BLOCK_N=tile.keys, **tile.options
        )
    return out, lse
