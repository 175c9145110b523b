"""What the kernels of the weight perturbation do with a record of a table, and with a block of entries behind it.

Entries are flat. A block that lies wholly in its chunk, in tensors aligned to 16 bytes, goes without masks and with
vector loads (WHOLE); the others entry by entry under a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .perturbation_math import (
    add_squares,
    power_of_two,
    product,
    rounded_bits,
    scaled,
    sum_of_squared_products,
    sum_of_squares,
)


@triton.jit
def load_record(table_ptr, COLUMNS: tl.constexpr):
    record_ptr = table_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    entries = tl.load(record_ptr + 3).to(tl.int32)
    return record_ptr, tl.load(record_ptr), tl.load(record_ptr + 1), tl.load(record_ptr + 2), entries


@triton.jit
def whole_blocks(addresses, entries, BLOCK: tl.constexpr):
    """The entries in blocks that go without masks and with vector loads: those of tensors aligned to 16 bytes."""
    return tl.where(addresses % 16 == 0, entries // BLOCK * BLOCK, 0)


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_entries(address, i_entry, entries, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    pointer = pointer_to(address, DTYPE, WHOLE)
    if WHOLE:
        return tl.load(pointer + i_entry)
    else:
        return tl.load(pointer + i_entry, mask=i_entry < entries, other=0)


@triton.jit
def store_entries(address, i_entry, entries, b_value, WHOLE: tl.constexpr):
    pointer = pointer_to(address, b_value.dtype, WHOLE)
    if WHOLE:
        tl.store(pointer + i_entry, b_value)
    else:
        tl.store(pointer + i_entry, b_value, mask=i_entry < entries)


@triton.jit
def add_block(
    weight, grad, i_entry, entries, total, exponent, weight_total, weight_exponent, WEIGHT: tl.constexpr,
    GRAD: tl.constexpr, COMPUTE: tl.constexpr, ADAPTIVE: tl.constexpr, AWP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The sums of squares of u, and with AWP of w, as pairs (s, e), with one more block in them."""
    b_g = load_entries(grad, i_entry, entries, GRAD, WHOLE).to(COMPUTE)
    if ADAPTIVE or AWP:
        b_w = load_entries(weight, i_entry, entries, WEIGHT, WHOLE).to(COMPUTE)
    if ADAPTIVE:
        s, e = sum_of_squared_products(b_w, b_g, COMPUTE)
    else:
        s, e = sum_of_squares(b_g, COMPUTE)
    total, exponent = add_squares(total, exponent, s, e)
    if AWP:
        s, e = sum_of_squares(b_w, COMPUTE)
        weight_total, weight_exponent = add_squares(weight_total, weight_exponent, s, e)
    return total, exponent, weight_total, weight_exponent


@triton.jit
def move_block(
    weight, grad, stash, i_entry, entries, moves, exponent, scale, WEIGHT: tl.constexpr, BITS: tl.constexpr,
    GRAD: tl.constexpr, COMPUTE: tl.constexpr, ADAPTIVE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """stash = w;   w + ((d 2^-exponent) scale), adaptive: w + ((|w| g 2^-exponent) scale) |w|."""
    b_bits = load_entries(weight, i_entry, entries, BITS, WHOLE)
    b_g = load_entries(grad, i_entry, entries, GRAD, WHOLE).to(COMPUTE)  # both are under way before the store waits
    store_entries(stash, i_entry, entries, b_bits, WHOLE)
    if moves:
        b_w = b_bits.to(WEIGHT, bitcast=True).to(COMPUTE)
        if ADAPTIVE:
            b_m, b_e = product(b_w, b_g, COMPUTE)
            b_step = scaled(b_m, b_e - exponent, COMPUTE) * scale * tl.abs(b_w)
        else:
            b_step = b_g * power_of_two(-exponent, COMPUTE) * scale
        store_entries(weight, i_entry, entries, rounded_bits(b_w + b_step, WEIGHT), WHOLE)
