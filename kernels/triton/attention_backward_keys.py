"""Backward attention: the kernel that owns blocks of keys. See attention_backward.py.

    a_ij = dP_ij - delta_i,   ds_ij = p_ij a_ij
    dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i keep_ij / (1 - p_drop) p_ij do_i,   dm_j = sum_i e_ij a_ij

dm has no division by m, so it is finite as m goes to 0. Blocks are [keys, queries]. A block of keys sums over the query
heads that it serves, one after the other; dm is each head's own.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from .attention_arguments import Array, Inputs, Statistics
from .attention_blocks import (
    kept,
    load_keys,
    load_rows,
    load_statistics,
    narrow,
    product,
    row_products,
    rows_at,
    rows_of,
    sample_of,
    scores,
    store_rows,
)
from .attention_tiles import Tile

# e^(x - lse) <= 2^110: keys of weight 0 are not in the log-sum-exp; products with it stay finite.
LARGEST_EXPONENT = tl.constexpr(110.0)
FAINT, RAISED = tl.constexpr(2.0**-100), tl.constexpr(40.0)


@triton.jit(do_not_specialize=["blocks"])
def attention_backward_keys_kernel(
    inputs, grad, statistics, grad_k_ptr, grad_v_ptr, grad_weights_ptr, blocks,
    GROUP: tl.constexpr, EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk, dv and dm of BLOCK_N keys of one key head."""
    i_program = tl.program_id(0)
    i_start = (i_program % blocks) * BLOCK_N
    b, g = i_program // blocks // inputs.key_heads, i_program // blocks % inputs.key_heads
    first, count, _ = sample_of(inputs.queries, b)
    key_first, key_count, key_room = sample_of(inputs.keys, b)
    if i_start >= key_room:
        return
    i_rows, i_cols = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    m_count, m_room = i_start + i_rows < key_count, i_start + i_rows < key_room
    k_rows, v_rows = rows_at(inputs.k, b, g, key_first + i_start), rows_at(inputs.v, b, g, key_first + i_start)
    b_k = load_rows(k_rows, m_count, inputs.WIDTH, inputs.BLOCK_D)
    b_v = load_rows(v_rows, m_count, inputs.WIDTH, inputs.BLOCK_D)
    b_dk = tl.zeros([BLOCK_N, inputs.BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, inputs.BLOCK_D], tl.float32)
    m_any = i_rows < 0

    begin = (i_start // BLOCK_M) * BLOCK_M if inputs.CAUSAL else 0
    for i_member in range(0, GROUP):
        h = g * GROUP + i_member
        b_m, m_keys = load_keys(inputs, b, h, key_first, i_start, key_count, EXACT, BLOCK_N)
        m_any = m_any | m_keys
        b_weight, b_exponent = raise_faint(inputs, b_m)
        b_exponent = tl.where(m_keys, b_exponent, float("-inf"))
        b_dm = tl.zeros([BLOCK_N], tl.float32)
        # A key that is left out holds anything, but that stays in its row, which is not stored.
        end = tl.where(tl.max(m_keys.to(tl.int32), axis=0) > 0, count, 0)
        for i_first in range(begin, end, BLOCK_M):
            m_queries = i_first + i_cols < count
            # As m_count, but of the turn, so that what it loads is read again and not held in registers.
            m_here = i_start + i_rows < tl.where(i_first < end, key_count, 0)
            q_rows, do_rows = rows_at(inputs.q, b, h, first + i_first), rows_at(grad, b, h, first + i_first)
            b_q = load_rows(q_rows, m_queries, inputs.WIDTH, inputs.BLOCK_D)
            b_kq = row_products(inputs, k_rows, m_here, b_k, q_rows, m_queries, b_q)
            b_x = scores(
                inputs, b, h, b_kq, i_first, i_start, i_cols[None, :], i_rows[:, None],
                m_queries[None, :], m_keys[:, None], b_exponent[:, None],
            )  # fmt: skip
            row, step = rows_of(inputs.queries, first, i_first, b, h, inputs.heads)
            lse, delta = load_statistics(statistics, row, step, m_queries)
            b_e = exponentials(inputs, b_x, lse[None, :])
            m_some = m_queries & (lse != float("inf"))
            b_do = load_rows(do_rows, m_some, inputs.WIDTH, inputs.BLOCK_D)
            b_dp = row_products(inputs, v_rows, m_here, b_v, do_rows, m_some, b_do)
            b_p = b_e * b_weight[:, None] if inputs.weights.ptr is not None else b_e
            if inputs.dropout.seed is not None:
                m_kept = tl.trans(kept(inputs.dropout, b, h, i_first, i_start, BLOCK_M, BLOCK_N))
                b_dp = tl.where(m_kept, b_dp * inputs.dropout.factor, 0.0)
                b_p = tl.where(m_kept, b_p, 0.0)
            b_dv = product(narrow(b_p, b_do.dtype), b_do, b_dv)
            b_slope = b_e * (b_dp - delta[None, :])
            if grad_weights_ptr is not None:
                b_dm += tl.sum(b_slope, axis=1)
            b_ds = b_slope * b_weight[:, None] if inputs.weights.ptr is not None else b_slope
            b_dk = product(narrow(b_ds, b_q.dtype), b_q, b_dk)
        if grad_weights_ptr is not None:
            b_dm *= tl.where(b_exponent == -RAISED, 2.0**RAISED, 1.0)
            row, step = rows_of(inputs.keys, key_first, i_start, b, h, inputs.heads)
            tl.store(grad_weights_ptr + row + i_rows * step, tl.where(m_keys, b_dm, 0.0), mask=m_room)

    row, step = rows_of(inputs.keys, key_first, i_start, b, g, inputs.key_heads)
    b_dk = tl.where(m_any[:, None], b_dk * inputs.scale, 0.0)
    b_dv = tl.where(m_any[:, None], b_dv * inputs.dropout.factor, 0.0)
    store_rows(grad_k_ptr, row, step, m_room, b_dk, inputs.WIDTH, inputs.BLOCK_D)
    store_rows(grad_v_ptr, row, step, m_room, b_dv, inputs.WIDTH, inputs.BLOCK_D)


@triton.jit
def raise_faint(inputs, b_m):
    """(weight, exponent) of m = weight 2^exponent, as float32 has e^(x - lse) 2^exponent for every m > 0.

    A query that sees faint keys alone has an e^(x - lse) as large as these are small. No larger a power is taken off:
    beside keys of ordinary weight e^(x - lse), and with it dm, would vanish.
    """
    if inputs.weights.ptr is not None:
        m_faint = (b_m > 0) & (b_m < FAINT)
        return b_m * tl.where(m_faint, 2.0**RAISED, 1.0), tl.where(m_faint, -RAISED, 0.0)
    else:
        return b_m, tl.zeros(b_m.shape, tl.float32)


@triton.jit
def exponentials(inputs, b_x, lse):
    """e = e^(x - lse), from both in base 2."""
    b_exponent = b_x - lse
    if inputs.weights.ptr is not None:
        b_exponent = tl.where(b_exponent > LARGEST_EXPONENT, LARGEST_EXPONENT, b_exponent)
    return tl.exp2(b_exponent)


def launch_keys(
    inputs: Inputs, grad: Array, statistics: Statistics, grad_k: Tensor, grad_v: Tensor, grad_weights: Tensor,
    exact: bool, batch: int, tile: Tile,
) -> None:  # fmt: skip
    """Fills grad_k, grad_v ``[B, Hk, S, D]`` and, unless it is empty, grad_weights ``[B, H, S]``."""
    blocks = triton.cdiv(inputs.keys.longest, tile.keys)
    attention_backward_keys_kernel[(batch * inputs.key_heads * blocks,)](
        inputs, grad, statistics, grad_k, grad_v, grad_weights if grad_weights.numel() > 0 else None, blocks,
        GROUP=inputs.heads // inputs.key_heads, EXACT=bool(exact),
        BLOCK_M=tile.queries, BLOCK_N=tile.keys, **tile.options,
    )  # fmt: skip
