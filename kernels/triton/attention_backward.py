"""Backward attention: the kernel that owns blocks of queries, and the launcher of the pass. See attention.py.

    e_ij = e^(x_ij - lse_i),   p_ij = m_j e_ij,   delta_i = sum_d do_id o_id - dL/dlse_i
    dP_ij = keep_ij / (1 - p_drop) do_i . v_j,    ds_ij = p_ij (dP_ij - delta_i),    dq_i = scale sum_j ds_ij k_j

This kernel runs first: it leaves lse in base 2 and delta to those of the keys and of the bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .attention_arguments import Statistics, inputs_of, token_array
from .attention_backward_bias import launch_bias
from .attention_backward_keys import launch_keys
from .attention_blocks import (
    LOG2E,
    load_key_exponents,
    load_rows,
    narrow,
    product,
    row_products,
    rows_at,
    rows_of,
    sample_of,
    score_slopes,
    store_rows,
)
from .attention_tiles import tile_for


@triton.jit(do_not_specialize=["blocks"])
def attention_backward_queries_kernel(
    inputs, grad, statistics, out_ptr, lse_ptr, grad_lse_ptr, grad_q_ptr, blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq and delta of BLOCK_M queries of one head."""
    i_program = tl.program_id(0)
    i_start = (i_program % blocks) * BLOCK_M
    b, h = i_program // blocks // inputs.heads, i_program // blocks % inputs.heads
    g = h * inputs.key_heads // inputs.heads
    first, count, room = sample_of(inputs.queries, b)
    key_first, key_count, _ = sample_of(inputs.keys, b)
    if i_start >= room:
        return
    i_block = tl.arange(0, BLOCK_M)
    m_queries, m_room = i_start + i_block < count, i_start + i_block < room
    row, step = rows_of(inputs.queries, first, i_start, b, h, inputs.heads)
    i_rows = row + i_block * step

    lse = tl.load(lse_ptr + i_rows, mask=m_queries, other=float("-inf")) * LOG2E
    m_some = m_queries & (lse != float("-inf"))  # what comes for a query without a key counts for nothing, NaN too
    lse = tl.where(m_some, lse, float("inf"))
    q_rows, do_rows = rows_at(inputs.q, b, h, first + i_start), rows_at(grad, b, h, first + i_start)
    b_do = load_rows(do_rows, m_queries, inputs.WIDTH, inputs.BLOCK_D)
    b_o = load_rows((out_ptr + row * inputs.WIDTH, step * inputs.WIDTH), m_queries, inputs.WIDTH, inputs.BLOCK_D)
    delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), axis=1)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + i_rows, mask=m_queries, other=0.0)
    delta = tl.where(m_some, delta, 0.0)
    tl.store(statistics.lse + i_rows, lse, mask=m_room)
    tl.store(statistics.delta + i_rows, delta, mask=m_room)

    b_q = load_rows(q_rows, m_queries, inputs.WIDTH, inputs.BLOCK_D)
    end = tl.where(i_start < count, key_count, 0)
    if inputs.CAUSAL:
        end = tl.minimum(end, i_start + BLOCK_M)
    b_dq = tl.zeros([BLOCK_M, inputs.BLOCK_D], tl.float32)
    for i_first in range(0, end, BLOCK_N):
        b_exponent, m_keys = load_key_exponents(inputs, b, h, key_first, i_first, key_count, BLOCK_N)
        k_rows, v_rows = rows_at(inputs.k, b, g, key_first + i_first), rows_at(inputs.v, b, g, key_first + i_first)
        b_k = load_rows(k_rows, m_keys, inputs.WIDTH, inputs.BLOCK_D)
        b_v = load_rows(v_rows, m_keys, inputs.WIDTH, inputs.BLOCK_D)
        # As m_queries, but of the turn, so that what it loads is read again and not held in registers.
        m_here = i_start + i_block < tl.where(i_first < end, count, 0)
        b_qk = row_products(inputs, q_rows, m_here, b_q, k_rows, m_keys, b_k)
        b_dp = row_products(inputs, do_rows, m_here, b_do, v_rows, m_keys, b_v)
        b_ds = score_slopes(inputs, b, h, b_qk, b_dp, b_exponent, i_start, i_first, m_queries, m_keys, lse, delta)
        b_dq = product(narrow(b_ds, b_k.dtype), b_k, b_dq)
    store_rows(grad_q_ptr, row, step, m_room, b_dq * inputs.scale, inputs.WIDTH, inputs.BLOCK_D)


def attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, key_weights: Tensor | None, mask: Tensor | None, bias: Tensor | None,
    lengths: Tensor | None, query_lengths: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    max_queries: int, max_keys: int, causal: bool, scale: float, dropout_p: float, seed: Tensor | None,
    exact_zero_weight_grad: bool, need_weights: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients, from the forward pass's outputs.

    Args:
        grad_out: as q, any strides.
        grad_lse: as lse, or None for 0.
        out, lse: of the forward pass.
        q, ..., seed: as in the forward pass.
        exact_zero_weight_grad: keys of weight 0 have their true gradient dL/dm, not 0.
        need_weights, need_bias: whether those gradients are wanted.

    Returns:
        ``(grad_q, grad_k, grad_v, grad_weights, grad_bias)``, contiguous: grad_weights ``[B, H, S]``, packed
        ``[Tk, H]``, float32, of each query head; grad_bias as the bias. ``[0]`` where they are not wanted.
    """
    inputs = inputs_of(
        q, k, v, key_weights, mask, bias, lengths, query_lengths, cu_seqlens_q, cu_seqlens_k, max_queries, max_keys,
        causal, scale, dropout_p, seed,
    )  # fmt: skip
    packed = cu_seqlens_q is not None
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    tokens = (k.shape[0], q.shape[1]) if packed else (batch, q.shape[1], max_keys)
    grad_weights = torch.empty(tokens if need_weights else 0, dtype=torch.float32, device=q.device)
    grad, statistics = token_array(grad_out, packed), Statistics(torch.empty_like(lse), torch.empty_like(lse))
    tile = tile_for("queries", q.dtype, q.shape[-1], max_queries, max_keys)
    blocks = triton.cdiv(max_queries, tile.queries)
    with torch.cuda.device_of(q):
        if lse.numel() > 0:
            attention_backward_queries_kernel[(batch * inputs.heads * blocks,)](
                inputs, grad, statistics, out.contiguous(), lse.contiguous(),
                None if grad_lse is None else grad_lse.contiguous(), grad_q, blocks,
                BLOCK_M=tile.queries, BLOCK_N=tile.keys, **tile.options,
            )  # fmt: skip
        if grad_k.numel() > 0 or grad_weights.numel() > 0:
            tile = tile_for("keys", q.dtype, q.shape[-1], max_queries, max_keys)
            launch_keys(inputs, grad, statistics, grad_k, grad_v, grad_weights, exact_zero_weight_grad, batch, tile)
        if need_bias and bias is not None:
            tile = tile_for("bias", q.dtype, q.shape[-1], max_queries, max_keys)
            grad_bias = launch_bias(inputs, grad, statistics, bias, batch, tile)
        else:
            grad_bias = torch.empty(0, dtype=torch.float32, device=q.device)
    return grad_q, grad_k, grad_v, grad_weights, grad_bias
