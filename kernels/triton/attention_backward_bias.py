"""Backward attention: the kernel that owns blocks of the bias's gradient. See attention_backward.py.

    db = ds_ij = p_ij (dP_ij - delta_i), summed over the samples, heads and queries that share an entry of the bias

An entry has one owner, which adds its terms in one order. Where the bias is shared so widely that few blocks are left,
the terms are split into slices with owners of their own, whose sums are added up afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .attention_arguments import Array, Inputs, Statistics
from .attention_blocks import (
    load_key_exponents,
    load_rows,
    load_statistics,
    row_products,
    rows_at,
    rows_of,
    sample_of,
    score_slopes,
)
from .attention_tiles import Tile

PROGRAMS = 1024  # that fill a large GPU; slices are added until there are as many


@triton.jit
def attention_backward_bias_kernel(
    inputs, grad, statistics, grad_bias_ptr, grad_samples, grad_heads, grad_queries, query_blocks, key_blocks,
    shared_heads, shared_blocks, terms, terms_per_slice,
    PER_QUERY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """db of BLOCK_N keys, and BLOCK_M queries where each has its own, summed over one slice of the terms."""
    i_program = tl.program_id(0)
    i_start = (i_program % key_blocks) * BLOCK_N
    i_program = i_program // key_blocks
    i_block = i_program % query_blocks
    i_program = i_program // query_blocks
    h_own, b_own = i_program % grad_heads, i_program // grad_heads % grad_samples
    i_slice = i_program // grad_heads // grad_samples
    i_keys = i_start + tl.arange(0, BLOCK_N)
    b_db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    begin = i_slice * terms_per_slice
    for i_term in range(begin, tl.minimum(begin + terms_per_slice, terms)):
        i_first = (i_block + i_term % shared_blocks) * BLOCK_M
        h = h_own + i_term // shared_blocks % shared_heads
        b = b_own + i_term // shared_blocks // shared_heads
        first, count, _ = sample_of(inputs.queries, b)
        key_first, key_count, _ = sample_of(inputs.keys, b)
        seen = (i_first < count) & (i_start < key_count)
        if inputs.CAUSAL:
            seen = seen & (i_start < i_first + BLOCK_M)
        if seen:
            g = h * inputs.key_heads // inputs.heads
            m_queries = i_first + tl.arange(0, BLOCK_M) < count
            row, step = rows_of(inputs.queries, first, i_first, b, h, inputs.heads)
            b_exponent, m_keys = load_key_exponents(inputs, b, h, key_first, i_start, key_count, BLOCK_N)
            q_rows, do_rows = rows_at(inputs.q, b, h, first + i_first), rows_at(grad, b, h, first + i_first)
            k_rows, v_rows = rows_at(inputs.k, b, g, key_first + i_start), rows_at(inputs.v, b, g, key_first + i_start)
            b_q = load_rows(q_rows, m_queries, inputs.WIDTH, inputs.BLOCK_D)
            b_k = load_rows(k_rows, m_keys, inputs.WIDTH, inputs.BLOCK_D)
            b_qk = row_products(inputs, q_rows, m_queries, b_q, k_rows, m_keys, b_k)
            lse, delta = load_statistics(statistics, row, step, m_queries)
            b_do = load_rows(do_rows, m_queries, inputs.WIDTH, inputs.BLOCK_D)
            b_v = load_rows(v_rows, m_keys, inputs.WIDTH, inputs.BLOCK_D)
            b_dp = row_products(inputs, do_rows, m_queries, b_do, v_rows, m_keys, b_v)
            b_db += score_slopes(inputs, b, h, b_qk, b_dp, b_exponent, i_first, i_start, m_queries, m_keys, lse, delta)

    i_row = ((i_slice.to(tl.int64) * grad_samples + b_own) * grad_heads + h_own) * grad_queries
    m_keys = i_keys < inputs.keys.longest
    if PER_QUERY:
        i_queries = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
        i_entry = (i_row + i_queries)[:, None] * inputs.keys.longest + i_keys[None, :]
        tl.store(grad_bias_ptr + i_entry, b_db, mask=(i_queries < grad_queries)[:, None] & m_keys[None, :])
    else:
        tl.store(grad_bias_ptr + i_row * inputs.keys.longest + i_keys, tl.sum(b_db, axis=0), mask=m_keys)


def launch_bias(
    inputs: Inputs, grad: Array, statistics: Statistics, bias: Tensor, batch: int, tile: Tile
) -> Tensor:  # fmt: skip
    """dL/db, contiguous, of the bias's shape ``[1|B, 1|H, 1|L, S]``."""
    if bias.numel() == 0:
        return torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
    samples, heads, queries, keys = bias.shape
    per_query = queries > 1
    query_blocks, key_blocks = triton.cdiv(queries, tile.queries), triton.cdiv(keys, tile.keys)
    shared_samples = batch if samples == 1 else 1
    shared_heads = inputs.heads if heads == 1 else 1
    shared_blocks = 1 if per_query else triton.cdiv(inputs.queries.longest, tile.queries)
    terms = shared_samples * shared_heads * shared_blocks
    owners = samples * heads * query_blocks * key_blocks
    terms_per_slice = triton.cdiv(max(terms, 1), triton.cdiv(PROGRAMS, owners))
    slices = triton.cdiv(max(terms, 1), terms_per_slice)
    partial = torch.empty((slices, *bias.shape), dtype=torch.float32, device=bias.device)
    attention_backward_bias_kernel[(slices * owners,)](
        inputs, grad, statistics, partial, samples, heads, queries, query_blocks, key_blocks,
        shared_heads, shared_blocks, terms, terms_per_slice,
        PER_QUERY=per_query, BLOCK_M=tile.queries, BLOCK_N=tile.keys, **tile.options,
    )  # fmt: skip
    return partial[0] if slices == 1 else partial.sum(0)
