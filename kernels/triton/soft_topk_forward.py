"""Forward soft top-k: kernels and launcher. See soft_topk.py.

T_i = sigma(sign (s_i - lambda) / tau),   lambda such that sum_i T_i = k
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .launch_options import launch_options
from .soft_topk_math import (
    after_selection,
    after_sweep,
    argument,
    block_marginals,
    block_stats,
    block_sums,
    classify,
    inverse_temperature,
    row_count,
    row_sum,
    select_in_block,
    sigmoid,
    sinkhorn_step,
    start,
    usable_tau,
    window_shift,
)
from .soft_topk_rows import (
    BLOCK_LIMIT,
    bits_of,
    compute_dtype,
    launch_shape,
    load_block,
    load_lengths,
    load_parameter,
    row_arguments,
    row_vector,
    store_block,
    unit_columns,
)
from .soft_topk_select import select_in_chunks


@triton.jit
def weigh(b_x, m_valid, pivot, inverse_tau, c, scale, saturated, fill):
    """The weights of a block, and the count and distance sums of its certificate."""
    b_t = argument(b_x, pivot, inverse_tau, c)
    b_T, _, b_d = sigmoid(b_t)
    m_filled = m_valid & ((b_x > float("-inf")) | (fill != fill)[:, None])
    b_fill = tl.where(m_filled, fill.to(b_x.dtype)[:, None], 0.0)
    b_T = tl.where(saturated[:, None], b_fill, b_T * scale.to(b_x.dtype)[:, None])
    return b_T, row_count(b_t >= 0), row_sum(b_d)


@triton.jit
def store_row(
    threshold_ptr, certificate_ptr, i_rows, m_rows, cols, saturated, edge, edge_residual, pivot, c, tau,
    residual, sweeps,
    SIGN: tl.constexpr,
):  # fmt: skip
    tl.store(threshold_ptr + i_rows, SIGN * tl.where(saturated, edge, pivot - c * tau), mask=m_rows)
    tl.store(certificate_ptr + 2 * i_rows, tl.where(saturated, edge_residual, residual), mask=m_rows)
    sweeps = tl.where(cols > 0, sweeps + tl.where(saturated, 0, 1), 0)
    tl.store(certificate_ptr + 2 * i_rows + 1, sweeps.to(tl.float64), mask=m_rows)


@triton.jit(do_not_specialize=["k_bits", "tau_bits", "iterations"])
def soft_topk_forward_block(
    scores_ptr, weights_ptr, threshold_ptr, certificate_ptr, k_ptr, tau_ptr, lengths_ptr, mask_ptr,
    k_bits, tau_bits, rows, cols, scores_stride, mask_stride, iterations,
    SIGN: tl.constexpr, COMPUTE: tl.constexpr, SINKHORN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """T = sigma((x - lambda) / tau) of ROWS rows that fit a block each."""
    i_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_cols = tl.arange(0, BLOCK)
    m_rows = i_rows < rows
    lengths = load_lengths(lengths_ptr, i_rows, m_rows, cols)
    b_x, m_valid = load_block(scores_ptr, scores_stride, mask_ptr, mask_stride, i_rows, i_cols, lengths, SIGN, COMPUTE)
    k = load_parameter(k_ptr, k_bits, i_rows, m_rows)
    tau = usable_tau(load_parameter(tau_ptr, tau_bits, i_rows, m_rows), COMPUTE)

    origin = tl.zeros_like(k)
    valid, finite, bad, low, high, total, _ = block_stats(b_x, m_valid, origin)
    entries = tl.maximum(finite, 1.0)
    mean = total / entries
    squares = block_stats(b_x, m_valid, mean)[6]
    saturated, fill, edge, edge_residual, k, n, tau = classify(valid, finite, bad, k, tau)
    inverse_tau = inverse_temperature(tau, COMPUTE)
    action, pivot, c, lo, hi = start(low, high, mean, squares / entries, k, n, tau, saturated, COMPUTE)
    sweeps = tl.full([ROWS], 1, tl.int32)
    trials = tl.zeros([ROWS], tl.int32)
    selected = tl.zeros([ROWS], tl.int32)
    scale = tl.full([ROWS], 1.0, tl.float64)
    shift = tl.zeros([ROWS], tl.float64)

    if SINKHORN:
        pivot = tl.full([ROWS], 0.5 * SIGN, tl.float64)
        low, high = tl.where(saturated, 0.0, low), tl.where(saturated, 0.0, high)
        shift = window_shift(tl.zeros([ROWS], tl.float64), low, high, pivot, tau)
        c = shift
        for i_step in range(iterations):
            taken, left = block_marginals(b_x, pivot, inverse_tau, c)
            scale = k / taken
            if i_step + 1 < iterations:
                c, shift = sinkhorn_step(c, shift, taken, left, low, high, pivot, k, n, tau)
                sweeps += 1
    else:
        while tl.max(action, axis=0) > 0:
            m_select = action == 2
            if tl.max(m_select.to(tl.int32), axis=0) > 0:
                value, above, equal, below = select_in_block(m_select, b_x, low, high, k)
                pivot, c, lo, hi = after_selection(
                    m_select, value, above, equal, below, pivot, c, lo, hi, k, tau, COMPUTE
                )
                selected = tl.where(m_select, 1, selected)
                action = tl.where(m_select, 1, action)
            upper, d, W, wT, ww, active, outer_upper, outer_d = block_sums(b_x, pivot, inverse_tau, c)
            action, pivot, c, lo, hi, trials = after_sweep(
                action == 1, upper, d, W, wT, ww, active, outer_upper, outer_d,
                action, pivot, c, lo, hi, trials, selected, k, n, tau, COMPUTE,
            )  # fmt: skip
        sweeps += trials + 3 * selected

    b_T, upper, d = weigh(b_x, m_valid, pivot, inverse_tau, c, scale, saturated, fill)
    store_block(weights_ptr, cols, i_rows, i_cols, m_rows, b_T)
    # A shift has all of T below e^-WINDOW, or all at 1.
    residual = tl.where(shift > 0, (upper + d) * tl.exp(-shift) - k, (upper - k) + d)
    store_row(
        threshold_ptr, certificate_ptr, i_rows, m_rows, cols, saturated, edge, edge_residual, pivot, c - shift, tau,
        residual, sweeps, SIGN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["k_bits", "tau_bits", "iterations"])
def soft_topk_forward_chunked(
    scores_ptr, weights_ptr, threshold_ptr, certificate_ptr, k_ptr, tau_ptr, lengths_ptr, mask_ptr,
    k_bits, tau_bits, rows, cols, scores_stride, mask_stride, iterations,
    SIGN: tl.constexpr, COMPUTE: tl.constexpr, SINKHORN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """T = sigma((x - lambda) / tau) of one row of any length: each sweep reads it again, in chunks."""
    i_rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    i_block = tl.arange(0, BLOCK)
    m_rows = i_rows < rows
    lengths = load_lengths(lengths_ptr, i_rows, m_rows, cols)
    limit = tl.max(lengths, axis=0).to(tl.int32)
    k = load_parameter(k_ptr, k_bits, i_rows, m_rows)
    tau = usable_tau(load_parameter(tau_ptr, tau_bits, i_rows, m_rows), COMPUTE)

    b_head, m_head = load_block(
        scores_ptr, scores_stride, mask_ptr, mask_stride, i_rows, i_block, lengths, SIGN, COMPUTE
    )
    head = block_stats(b_head, m_head, tl.zeros_like(k))
    origin = head[5] / tl.maximum(head[1], 1.0)  # of the variance, so that a common offset does not cancel
    valid, finite, bad = tl.zeros_like(k), tl.zeros_like(k), tl.zeros_like(k)
    total, squares = tl.zeros_like(k), tl.zeros_like(k)
    low, high = tl.full([1], float("inf"), tl.float64), tl.full([1], float("-inf"), tl.float64)
    for i_first in range(0, limit, BLOCK):
        b_x, m_valid = load_block(
            scores_ptr,
            scores_stride,
            mask_ptr,
            mask_stride,
            i_rows,
            i_first + i_block,
            lengths,
            SIGN,
            COMPUTE,
        )
        p_valid, p_finite, p_bad, p_low, p_high, p_total, p_squares = block_stats(b_x, m_valid, origin)
        valid, finite, bad = valid + p_valid, finite + p_finite, bad + p_bad
        total, squares = total + p_total, squares + p_squares
        low, high = tl.minimum(low, p_low), tl.maximum(high, p_high)
    entries = tl.maximum(finite, 1.0)
    shift = total / entries
    var = tl.maximum(squares / entries - shift * shift, 0.0)
    saturated, fill, edge, edge_residual, k, n, tau = classify(valid, finite, bad, k, tau)
    inverse_tau = inverse_temperature(tau, COMPUTE)
    action, pivot, c, lo, hi = start(low, high, origin + shift, var, k, n, tau, saturated, COMPUTE)
    sweeps = tl.full([1], 1, tl.int32)
    trials = tl.zeros([1], tl.int32)
    selected = tl.zeros([1], tl.int32)
    scale = tl.full([1], 1.0, tl.float64)
    shift = tl.zeros([1], tl.float64)

    if SINKHORN:
        pivot = tl.full([1], 0.5 * SIGN, tl.float64)
        low, high = tl.where(saturated, 0.0, low), tl.where(saturated, 0.0, high)
        shift = window_shift(tl.zeros([1], tl.float64), low, high, pivot, tau)
        c = shift
        for i_step in range(iterations):
            taken, left = tl.zeros_like(k), tl.zeros_like(k)
            for i_first in range(0, limit, BLOCK):
                b_x = load_block(
                    scores_ptr,
                    scores_stride,
                    mask_ptr,
                    mask_stride,
                    i_rows,
                    i_first + i_block,
                    lengths,
                    SIGN,
                    COMPUTE,
                )[0]
                p_taken, p_left = block_marginals(b_x, pivot, inverse_tau, c)
                taken, left = taken + p_taken, left + p_left
            scale = k / taken
            if i_step + 1 < iterations:
                c, shift = sinkhorn_step(c, shift, taken, left, low, high, pivot, k, n, tau)
                sweeps += 1
    else:
        while tl.max(action, axis=0) > 0:
            if tl.max(action, axis=0) == 2:
                value, above, equal, below = select_in_chunks(
                    scores_ptr,
                    scores_stride,
                    mask_ptr,
                    mask_stride,
                    i_rows,
                    lengths,
                    limit,
                    k,
                    SIGN,
                    COMPUTE,
                    BLOCK,
                )
                pivot, c, lo, hi = after_selection(
                    action == 2, value, above, equal, below, pivot, c, lo, hi, k, tau, COMPUTE
                )
                selected = tl.full([1], 1, tl.int32)
                action = tl.full([1], 1, tl.int32)
            upper, d, W, wT = tl.zeros_like(k), tl.zeros_like(k), tl.zeros_like(k), tl.zeros_like(k)
            ww, active = tl.zeros_like(k), tl.zeros_like(k)
            outer_upper, outer_d = tl.zeros_like(k), tl.zeros_like(k)
            for i_first in range(0, limit, BLOCK):
                b_x = load_block(
                    scores_ptr,
                    scores_stride,
                    mask_ptr,
                    mask_stride,
                    i_rows,
                    i_first + i_block,
                    lengths,
                    SIGN,
                    COMPUTE,
                )[0]
                p_upper, p_d, p_W, p_wT, p_ww, p_active, p_outer_upper, p_outer_d = block_sums(
                    b_x, pivot, inverse_tau, c
                )
                upper, d, W, wT = upper + p_upper, d + p_d, W + p_W, wT + p_wT
                ww, active = ww + p_ww, active + p_active
                outer_upper, outer_d = outer_upper + p_outer_upper, outer_d + p_outer_d
            action, pivot, c, lo, hi, trials = after_sweep(
                action == 1, upper, d, W, wT, ww, active, outer_upper, outer_d,
                action, pivot, c, lo, hi, trials, selected, k, n, tau, COMPUTE,
            )  # fmt: skip
        sweeps += trials + (4 if COMPUTE.is_fp64() else 3) * selected

    upper, d = tl.zeros_like(k), tl.zeros_like(k)
    for i_first in range(0, cols, BLOCK):
        b_x, m_valid = load_block(
            scores_ptr,
            scores_stride,
            mask_ptr,
            mask_stride,
            i_rows,
            i_first + i_block,
            lengths,
            SIGN,
            COMPUTE,
        )
        b_T, p_upper, p_d = weigh(b_x, m_valid, pivot, inverse_tau, c, scale, saturated, fill)
        store_block(weights_ptr, cols, i_rows, i_first + i_block, m_rows, b_T)
        upper, d = upper + p_upper, d + p_d
    # A shift has all of T below e^-WINDOW, or all at 1.
    residual = tl.where(shift > 0, (upper + d) * tl.exp(-shift) - k, (upper - k) + d)
    store_row(
        threshold_ptr, certificate_ptr, i_rows, m_rows, cols, saturated, edge, edge_residual, pivot, c - shift, tau,
        residual, sweeps, SIGN,
    )  # fmt: skip


def soft_topk_forward(
    scores: Tensor,
    k: Tensor | None,
    k_value: float,
    tau: Tensor | None,
    tau_value: float,
    lengths: Tensor | None,
    mask: Tensor | None,
    largest: bool,
    sinkhorn_iterations: int,
    block_limit: int = BLOCK_LIMIT,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, thresholds and certificates of the rows of `scores`.

    Args:
        scores: ``[R, n]`` float32, float64, bfloat16 or float16, any strides.
        k: ``[R]`` float64, or None: then `k_value` for all rows.
        tau: ``[R]`` float64 temperatures in the units of the scores, or None: then `tau_value`.
        lengths: ``[R]`` int64 valid entries at the start of each row, or None.
        mask: ``[R, n]`` bool, True where valid, or None.
        largest: whether weights near 1 go to the largest scores, else to the smallest.
        sinkhorn_iterations: 0 solves the fixed point; N > 0 gives the output after N Sinkhorn iterations.
        block_limit: longest row that one program holds; longer ones are read in chunks.

    Returns:
        ``(weights [R, n] in the dtype of scores, threshold [R] float64, certificate [R, 2] float64)``; a
        certificate is the residual ``sum sigma((s - lambda)/tau) - k`` and the number of sweeps over the row.
    """
    rows, cols = scores.shape
    weights = torch.empty((rows, cols), dtype=scores.dtype, device=scores.device)
    threshold = torch.empty(rows, dtype=torch.float64, device=scores.device)
    certificate = torch.empty((rows, 2), dtype=torch.float64, device=scores.device)
    if rows == 0:
        return weights, threshold, certificate
    tau, lengths, mask, tau_bits, mask_stride = row_arguments(lengths, mask, tau, tau_value)
    scores, k = unit_columns(scores), row_vector(k)
    shape = launch_shape(cols, block_limit)
    constants = {
        "SIGN": 1 if largest else -1,
        "COMPUTE": compute_dtype(scores.dtype),
        "SINKHORN": sinkhorn_iterations > 0,
        "BLOCK": shape.block,
        **launch_options(shape.warps),
    }
    kernel = soft_topk_forward_chunked
    if not shape.chunked:
        kernel = soft_topk_forward_block
        constants["ROWS"] = shape.rows
    with torch.cuda.device_of(scores):
        kernel[(triton.cdiv(rows, shape.rows),)](
            scores, weights, threshold, certificate, k, tau, lengths, mask,
            bits_of(k_value), tau_bits, rows, cols, scores.stride(0), mask_stride, sinkhorn_iterations,
            **constants,
        )  # fmt: skip
    return weights, threshold, certificate
