"""Backward soft top-k: kernels and launcher. See soft_topk.py.

    t_i = sign (s_i - lambda) / tau     w_i = T_i (1 - T_i)     W = sum w
    m = (sum w g - sign tau dL/dlambda) / W
    dL/ds_i = sign w_i (g_i - m) / tau   dL/dk = m   dL/dtau = -(sum w g t - m sum w t) / tau

Where W underflows (a hard selection), or a row has no finite threshold, the gradient is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .launch_options import launch_options
from .soft_topk_math import argument, inverse_temperature, round_to, row_sum, sigmoid, usable_tau
from .soft_topk_rows import (
    BLOCK_LIMIT,
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


@triton.jit
def load_threshold(threshold_ptr, i_rows, m_rows, tau, SIGN: tl.constexpr, COMPUTE: tl.constexpr):
    """lambda = pivot - c tau, the pivot in the compute type; rows without a threshold get a harmless one."""
    threshold = tl.load(threshold_ptr + i_rows, mask=m_rows, other=float("inf"))
    finite = tl.abs(threshold) < float("inf")
    threshold = tl.where(finite, SIGN * threshold, 0.0)
    pivot = round_to(threshold, COMPUTE)
    return finite, pivot, (pivot - threshold) / tau


@triton.jit
def load_gradient(grad_ptr, grad_stride, i_rows, i_cols, b_x):
    """g of the entries that take part, 0 elsewhere."""
    m_part = b_x > float("-inf")
    b_g = tl.load(grad_ptr + i_rows[:, None] * grad_stride + i_cols[None, :], mask=m_part, other=0.0)
    return b_g.to(b_x.dtype)


@triton.jit
def slopes(b_x, pivot, inverse_tau, c, finite):
    """w and t; both 0 where an entry takes no part."""
    m_part = (b_x > float("-inf")) & finite[:, None]
    b_t = tl.where(m_part, argument(tl.where(m_part, b_x, 0.0), pivot, inverse_tau, c), 0.0)
    b_T, b_U, _ = sigmoid(b_t)
    return tl.where(m_part, b_T * b_U, 0.0), b_t


@triton.jit
def gradient_sums(b_w, b_t, b_g):
    """sum w, sum w g, sum w t, sum w g t. Where w is 0 a large t may have overflowed, and g may hold anything."""
    b_t = tl.minimum(tl.maximum(b_t, -1e30), 1e30)
    b_wg = tl.where(b_w > 0, b_w * b_g, 0.0)
    return row_sum(b_w), row_sum(b_wg), row_sum(b_w * b_t), row_sum(b_wg * b_t)


@triton.jit
def mean_gradient(w, wg, grad_threshold_ptr, i_rows, m_rows, tau, SIGN: tl.constexpr):
    if grad_threshold_ptr is not None:
        wg -= SIGN * tau * tl.load(grad_threshold_ptr + i_rows, mask=m_rows, other=0.0)
    usable = (w > 2.2250738585072014e-308) & (w < float("inf"))
    return tl.where(usable, wg / tl.where(usable, w, 1.0), 0.0)


@triton.jit
def flow(b_w, b_g, mean, inverse_tau, SIGN: tl.constexpr):
    """dL/ds."""
    b_flow = SIGN * inverse_tau[:, None] * b_w * (b_g - mean.to(b_w.dtype)[:, None])
    return tl.where(b_w > 0, b_flow, 0.0)


@triton.jit(do_not_specialize=["tau_bits"])
def soft_topk_backward_block(
    grad_weights_ptr, scores_ptr, threshold_ptr, grad_threshold_ptr, tau_ptr, lengths_ptr, mask_ptr,
    grad_scores_ptr, grad_k_ptr, grad_tau_ptr, tau_bits, rows, cols, grad_stride, scores_stride, mask_stride,
    SIGN: tl.constexpr, COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of ROWS rows that fit a block each."""
    i_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_cols = tl.arange(0, BLOCK)
    m_rows = i_rows < rows
    lengths = load_lengths(lengths_ptr, i_rows, m_rows, cols)
    tau = usable_tau(load_parameter(tau_ptr, tau_bits, i_rows, m_rows), COMPUTE)
    inverse_tau = inverse_temperature(tau, COMPUTE)
    finite, pivot, c = load_threshold(threshold_ptr, i_rows, m_rows, tau, SIGN, COMPUTE)

    b_x = load_block(scores_ptr, scores_stride, mask_ptr, mask_stride, i_rows, i_cols, lengths, SIGN, COMPUTE)[0]
    b_g = load_gradient(grad_weights_ptr, grad_stride, i_rows, i_cols, b_x)
    b_w, b_t = slopes(b_x, pivot, inverse_tau, c, finite)
    w, wg, wt, wgt = gradient_sums(b_w, b_t, b_g)
    mean = mean_gradient(w, wg, grad_threshold_ptr, i_rows, m_rows, tau, SIGN)
    store_block(grad_scores_ptr, cols, i_rows, i_cols, m_rows, flow(b_w, b_g, mean, inverse_tau, SIGN))
    tl.store(grad_k_ptr + i_rows, tl.where(finite, mean, 0.0), mask=m_rows)
    tl.store(grad_tau_ptr + i_rows, tl.where(finite, -(wgt - mean * wt) / tau, 0.0), mask=m_rows)


@triton.jit(do_not_specialize=["tau_bits"])
def soft_topk_backward_chunked(
    grad_weights_ptr, scores_ptr, threshold_ptr, grad_threshold_ptr, tau_ptr, lengths_ptr, mask_ptr,
    grad_scores_ptr, grad_k_ptr, grad_tau_ptr, tau_bits, rows, cols, grad_stride, scores_stride, mask_stride,
    SIGN: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of one row of any length: one sweep for the sums, one for the output."""
    i_rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    i_block = tl.arange(0, BLOCK)
    m_rows = i_rows < rows
    lengths = load_lengths(lengths_ptr, i_rows, m_rows, cols)
    limit = tl.max(lengths, axis=0).to(tl.int32)
    tau = usable_tau(load_parameter(tau_ptr, tau_bits, i_rows, m_rows), COMPUTE)
    inverse_tau = inverse_temperature(tau, COMPUTE)
    finite, pivot, c = load_threshold(threshold_ptr, i_rows, m_rows, tau, SIGN, COMPUTE)

    w, wg, wt, wgt = tl.zeros_like(tau), tl.zeros_like(tau), tl.zeros_like(tau), tl.zeros_like(tau)
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
        b_g = load_gradient(grad_weights_ptr, grad_stride, i_rows, i_first + i_block, b_x)
        b_w, b_t = slopes(b_x, pivot, inverse_tau, c, finite)
        p_w, p_wg, p_wt, p_wgt = gradient_sums(b_w, b_t, b_g)
        w, wg, wt, wgt = w + p_w, wg + p_wg, wt + p_wt, wgt + p_wgt
    mean = mean_gradient(w, wg, grad_threshold_ptr, i_rows, m_rows, tau, SIGN)
    for i_first in range(0, cols, BLOCK):
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
        b_g = load_gradient(grad_weights_ptr, grad_stride, i_rows, i_first + i_block, b_x)
        b_w = slopes(b_x, pivot, inverse_tau, c, finite)[0]
        b_flow = flow(b_w, b_g, mean, inverse_tau, SIGN)
        store_block(grad_scores_ptr, cols, i_rows, i_first + i_block, m_rows, b_flow)
    tl.store(grad_k_ptr + i_rows, tl.where(finite, mean, 0.0), mask=m_rows)
    tl.store(grad_tau_ptr + i_rows, tl.where(finite, -(wgt - mean * wt) / tau, 0.0), mask=m_rows)


def soft_topk_backward(
    grad_weights: Tensor,
    scores: Tensor,
    threshold: Tensor,
    grad_threshold: Tensor | None,
    tau: Tensor | None,
    tau_value: float,
    lengths: Tensor | None,
    mask: Tensor | None,
    largest: bool,
    block_limit: int = BLOCK_LIMIT,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the implicit function theorem, from the threshold that the forward found.

    Args:
        grad_weights: ``[R, n]`` in the dtype of scores, any strides.
        scores, tau, tau_value, lengths, mask, largest: as in the forward.
        threshold: ``[R]`` float64, the forward's.
        grad_threshold: ``[R]`` float64 or None.
        block_limit: longest row that one program holds; longer ones are read in chunks.

    Returns:
        ``(grad_scores [R, n] in the dtype of scores, grad_k [R] float64, grad_tau [R] float64)``.
    """
    rows, cols = scores.shape
    grad_scores = torch.empty((rows, cols), dtype=scores.dtype, device=scores.device)
    grad_k = torch.empty(rows, dtype=torch.float64, device=scores.device)
    grad_tau = torch.empty(rows, dtype=torch.float64, device=scores.device)
    if rows == 0:
        return grad_scores, grad_k, grad_tau
    tau, lengths, mask, tau_bits, mask_stride = row_arguments(lengths, mask, tau, tau_value)
    grad_weights, scores = unit_columns(grad_weights), unit_columns(scores)
    threshold, grad_threshold = threshold.contiguous(), row_vector(grad_threshold)
    shape = launch_shape(cols, block_limit)
    constants = {
        "SIGN": 1 if largest else -1,
        "COMPUTE": compute_dtype(scores.dtype),
        "BLOCK": shape.block,
        **launch_options(shape.warps),
    }
    kernel = soft_topk_backward_chunked
    if not shape.chunked:
        kernel = soft_topk_backward_block
        constants["ROWS"] = shape.rows
    with torch.cuda.device_of(scores):
        kernel[(triton.cdiv(rows, shape.rows),)](
            grad_weights, scores, threshold, grad_threshold, tau, lengths, mask, grad_scores, grad_k, grad_tau,
            tau_bits, rows, cols, grad_weights.stride(0), scores.stride(0), mask_stride,
            **constants,
        )  # fmt: skip
    return grad_scores, grad_k, grad_tau
