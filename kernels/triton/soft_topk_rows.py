"""What the soft top-k kernels share around the math: block shapes, launch arguments, loads and stores.

Blocks are [ROWS, BLOCK]; scores are read with the sign applied (x = sign * s), and an entry outside
`lengths` or `mask` reads as -inf, which adds nothing to any sum.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

BLOCK_LIMIT = 4096  # entries of the longest row that one program holds
CHUNK = 4096  # entries that a program of a longer row reads at a time


class Shape(NamedTuple):
    """Rows and entries of a program's block, its warps, and whether a row takes more than one block."""

    rows: int
    block: int
    warps: int
    chunked: bool


def launch_shape(cols: int, block_limit: int = BLOCK_LIMIT) -> Shape:
    """The fixed choice for rows of `cols` entries.

    16 entries a thread. A warp takes several rows only while each of its threads serves one: the solver's float64
    state of a second row would not fit its registers.
    """
    if cols > block_limit:
        return Shape(1, min(CHUNK, block_limit), 8, True)
    block = max(16, triton.next_power_of_2(cols))
    rows = max(1, 32 // block)
    return Shape(rows, block, min(16, max(1, block // 512)), False)


def bits_of(value: float) -> int:
    """The bits of a float64 launch argument: Triton would pass a Python float as float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def row_vector(vector: Tensor | None) -> Tensor | None:
    """`vector` (R,) with unit stride: the kernels add the row to its pointer. Expanded ones have stride 0."""
    return None if vector is None else vector.contiguous()


def unit_columns(matrix: Tensor) -> Tensor:
    """`matrix` (R, n) with unit column stride; any row stride."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def row_arguments(
    lengths: Tensor | None, mask: Tensor | None, tau: Tensor | None, tau_value: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None, int, int]:
    """(tau, lengths, mask as bytes, bits of tau_value, stride of the mask)."""
    if mask is not None:
        mask = unit_columns(mask).view(torch.uint8)
    mask_stride = 0 if mask is None else mask.stride(0)
    return row_vector(tau), row_vector(lengths), mask, bits_of(tau_value), mask_stride


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def scalar_of_bits(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def load_parameter(pointer, bits, i_rows, m_rows):
    if pointer is None:
        return tl.zeros(i_rows.shape, tl.float64) + scalar_of_bits(bits)
    else:
        return tl.load(pointer + i_rows, mask=m_rows, other=1.0)


@triton.jit
def load_lengths(pointer, i_rows, m_rows, cols):
    if pointer is None:
        return tl.where(m_rows, cols, 0).to(tl.int64)
    else:
        length = tl.load(pointer + i_rows, mask=m_rows, other=0)
        return tl.minimum(tl.maximum(length, 0), cols)


@triton.jit
def load_block(
    scores_ptr, scores_stride, mask_ptr, mask_stride, i_rows, i_cols, lengths,
    SIGN: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """x = sign * s (-inf where an entry takes no part), and validity. Adding 0 makes -0 and +0 one key."""
    m_valid = i_cols[None, :] < lengths[:, None]
    if mask_ptr is not None:
        b_mask = tl.load(mask_ptr + i_rows[:, None] * mask_stride + i_cols[None, :], mask=m_valid, other=0)
        m_valid = m_valid & (b_mask != 0)
    b_s = tl.load(scores_ptr + i_rows[:, None] * scores_stride + i_cols[None, :], mask=m_valid, other=0.0)
    b_x = b_s.to(COMPUTE) * SIGN + 0.0
    return tl.where(m_valid, b_x, float("-inf")), m_valid


@triton.jit
def store_block(pointer, cols, i_rows, i_cols, m_rows, b_value):
    m_store = m_rows[:, None] & (i_cols[None, :] < cols)
    i_entry = i_rows[:, None] * cols + i_cols[None, :]
    tl.store(pointer + i_entry, b_value.to(pointer.dtype.element_ty), mask=m_store)
