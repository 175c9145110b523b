"""The entry of a row at its selection_rank, read in chunks, by radix: 11, 11 and 10 bits of the float32 key.

Rows of float64 are ranked by their scores rounded to float32, which keeps the order; one more sweep finds a
score in the float32 that was found, enough for the solver to go on from.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .soft_topk_math import ordered_key, selection_rank, value_of_key
from .soft_topk_rows import load_block

BINS = tl.constexpr(2048)


@triton.jit
def radix_pass(
    scores_ptr, scores_stride, mask_ptr, mask_stride, i_rows, lengths, limit, rank, prefix,
    SHIFT: tl.constexpr, BITS: tl.constexpr, SIGN: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts the digits at SHIFT of the keys that start with `prefix`, and takes the one that holds the rank.

    Returns (longer prefix, rank within it, entries above it under this prefix, entries in it, largest lower key or 0).
    """
    i_block = tl.arange(0, BLOCK)
    i_bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    lower = tl.zeros([1], tl.int64)
    for i_first in range(0, limit, BLOCK):
        b_x, m_valid = load_block(
            scores_ptr, scores_stride, mask_ptr, mask_stride, i_rows, i_first + i_block, lengths, SIGN, COMPUTE
        )  # fmt: skip
        b_key = ordered_key(b_x.to(tl.float32), 32).to(tl.int64)
        m_finite = m_valid & (b_x > float("-inf"))
        b_head = b_key >> (SHIFT + BITS)
        m_inside = m_finite & (b_head == prefix[:, None])
        b_digit = tl.where(m_inside, (b_key >> SHIFT) & ((1 << BITS) - 1), 0).to(tl.int32)
        outside = BLOCK - tl.sum(tl.sum(m_inside.to(tl.int32), axis=1), axis=0)  # these fell into bin 0
        counts += tl.histogram(tl.reshape(b_digit, [BLOCK]), BINS) - tl.where(i_bins == 0, outside, 0)
        b_lower = tl.where(m_finite & (b_head < prefix[:, None]), b_key, 0)
        lower = tl.maximum(lower, tl.max(b_lower, axis=1))
    from_bin = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts  # entries in this bin or above
    found = tl.sum((from_bin >= rank).to(tl.int32), axis=0) - 1
    above = tl.sum(tl.where(i_bins > found, counts, 0), axis=0)
    equal = tl.sum(tl.where(i_bins == found, counts, 0), axis=0)
    next_bin = tl.max(tl.where((i_bins < found) & (counts > 0), i_bins, -1), axis=0)
    lower = tl.where(next_bin >= 0, ((prefix << BITS) + next_bin) << SHIFT, lower)
    return (prefix << BITS) + found, rank - above, above, equal, lower


@triton.jit
def select_in_chunks(
    scores_ptr, scores_stride, mask_ptr, mask_stride, i_rows, lengths, limit, k,
    SIGN: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(value, entries above, entries equal, largest entry below), each [1] float64."""
    none = tl.zeros([1], tl.int64)
    rank = tl.max(selection_rank(k), axis=0).to(tl.int32)
    prefix, rank, above_0, _, _ = radix_pass(
        scores_ptr, scores_stride, mask_ptr, mask_stride, i_rows, lengths, limit, rank, none,
        21, 11, SIGN, COMPUTE, BLOCK,
    )  # fmt: skip
    prefix, rank, above_1, _, _ = radix_pass(
        scores_ptr, scores_stride, mask_ptr, mask_stride, i_rows, lengths, limit, rank, prefix,
        10, 11, SIGN, COMPUTE, BLOCK,
    )  # fmt: skip
    key, rank, above_2, equal, lower = radix_pass(
        scores_ptr, scores_stride, mask_ptr, mask_stride, i_rows, lengths, limit, rank, prefix,
        0, 10, SIGN, COMPUTE, BLOCK,
    )  # fmt: skip

    if COMPUTE.is_fp64():
        value = tl.full([1], float("-inf"), tl.float64)
        below = tl.full([1], float("-inf"), tl.float64)
        for i_first in range(0, limit, BLOCK):
            b_x, m_valid = load_block(
                scores_ptr, scores_stride, mask_ptr, mask_stride, i_rows, i_first + tl.arange(0, BLOCK), lengths,
                SIGN, COMPUTE,
            )  # fmt: skip
            b_key = ordered_key(b_x.to(tl.float32), 32).to(tl.int64)
            b_here = tl.where(m_valid & (b_key == key[:, None]), b_x, float("-inf"))
            b_under = tl.where(m_valid & (b_key < key[:, None]), b_x, float("-inf"))
            value = tl.maximum(value, tl.max(b_here, axis=1))
            below = tl.maximum(below, tl.max(b_under, axis=1))
    else:
        value = value_of_key(key.to(tl.uint32), 32).to(tl.float64)
        neighbour = value_of_key(tl.where(lower > 0, lower, key).to(tl.uint32), 32).to(tl.float64)
        below = tl.where(lower > 0, neighbour, float("-inf"))
    above = (none + above_0 + above_1 + above_2).to(tl.float64)
    return value, above, (none + equal).to(tl.float64), below
