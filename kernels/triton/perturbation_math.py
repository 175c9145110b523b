"""Device functions of the weight perturbation: norms that neither overflow nor underflow, and the step.

    sum x^2 = s 4^e      e: exponent of the block's largest |x|, s = sum (x 2^-e)^2, about 1 up to 4 entries
    |w| g   = m 2^e      m the product of two numbers near 1: it exists also where |w| g has no float32

Powers of two scale exactly, and exponents are read from the bits. So float32 holds the sums of a block whatever the
magnitudes, and float64 is left for one pair (s, e) a block. The step is that of kernels/common/perturbation_math.h.

An exponent here is floor(log2 |x|), held between -127 and 126 (float64: -1023 and 1022), where the power of two and
its inverse are normal numbers: 2^-e brings x below 4, subnormals to at least 2^-22 (2^-51).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-2046)  # below the exponent of every product


@triton.jit
def power_of_two(exponent, COMPUTE: tl.constexpr):
    """2^exponent, exact; 0 for the exponent below the normal ones."""
    if COMPUTE.is_fp64():
        return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of_bits(bits, COMPUTE: tl.constexpr):
    if COMPUTE.is_fp64():
        return (tl.minimum(bits >> 52, 2045) - 1023).to(tl.int32)
    else:
        return tl.minimum(bits >> 23, 253) - 127


@triton.jit
def magnitude_bits(x, COMPUTE: tl.constexpr):
    """The bits of |x|: ordered as |x| is, infinity and then NaN above."""
    return tl.abs(x).to(tl.int64 if COMPUTE.is_fp64() else tl.int32, bitcast=True)


@triton.jit
def exponent_of(x, COMPUTE: tl.constexpr):
    return exponent_of_bits(magnitude_bits(x, COMPUTE), COMPUTE)


@triton.jit
def sum_of_squares(b_x, COMPUTE: tl.constexpr):
    """(s, e) with sum x^2 = s 4^e; s is not finite where an entry is not."""
    exponent = exponent_of_bits(tl.max(magnitude_bits(b_x, COMPUTE), axis=0), COMPUTE)
    b_q = b_x * power_of_two(-exponent, COMPUTE)
    return tl.sum(b_q * b_q, axis=0), exponent


@triton.jit
def product(b_w, b_g, COMPUTE: tl.constexpr):
    """(m, e) with |w| g = m 2^e and |m| below 16, above 2^-44 (float64: 2^-102) unless 0."""
    b_ew, b_eg = exponent_of(b_w, COMPUTE), exponent_of(b_g, COMPUTE)
    b_m = tl.abs(b_w) * power_of_two(-b_ew, COMPUTE) * (b_g * power_of_two(-b_eg, COMPUTE))
    return b_m, b_ew + b_eg


@triton.jit
def scaled(b_m, b_e, COMPUTE: tl.constexpr):
    """m 2^e for an e that only negligible entries have below the normal numbers."""
    limit: tl.constexpr = 1022 if COMPUTE.is_fp64() else 126
    return b_m * power_of_two(tl.minimum(tl.maximum(b_e, -limit), limit), COMPUTE)


@triton.jit
def sum_of_squared_products(b_w, b_g, COMPUTE: tl.constexpr):
    """(s, e) with sum (|w| g)^2 = s 4^e."""
    b_m, b_e = product(b_w, b_g, COMPUTE)
    exponent = tl.max(tl.where(b_m == 0, LOWEST, b_e), axis=0)
    b_q = scaled(b_m, b_e - exponent, COMPUTE)
    return tl.sum(b_q * b_q, axis=0), exponent


@triton.jit
def add_squares(total, exponent, s, e):
    """total 4^exponent + s 4^e, as such a pair; total is float64."""
    top = tl.maximum(exponent, e)
    kept = power_of_two(2 * tl.maximum(exponent - top, -511), tl.float64)
    added = power_of_two(2 * tl.maximum(e - top, -511), tl.float64)
    return total * kept + s.to(tl.float64) * added, top


@triton.jit
def root(total, exponent):
    """sqrt(total 4^exponent), float64; 2^exponent in two factors, for it may be none alone."""
    half = exponent >> 1
    return tl.sqrt(total) * power_of_two(half, tl.float64) * power_of_two(exponent - half, tl.float64)


@triton.jit
def norm_of_norms(parts_ptr, first, end, BLOCK: tl.constexpr):
    """|(p_first, ..., p_end-1)|_2, float64, always in the same order."""
    total, exponent = tl.full((), 0.0, tl.float64), tl.full((), LOWEST, tl.int32)
    for i_first in range(first, end, BLOCK):
        i_part = i_first + tl.arange(0, BLOCK)
        b_part = tl.load(parts_ptr + i_part, mask=i_part < end, other=0.0)
        s, e = sum_of_squares(b_part, tl.float64)
        total, exponent = add_squares(total, exponent, s, e)
    return root(total, exponent)


@triton.jit
def step_of(norm, reach, LIMIT: tl.constexpr):
    """(moves, e, scale): factor d = (d 2^-e) scale, with e within +-LIMIT; scale 0 where nothing moves."""
    moves = (norm > 0) & (norm < float("inf")) & (reach < float("inf"))
    divisor = tl.where(moves, norm, 1.0)
    exponent = tl.minimum(tl.maximum(exponent_of(divisor, tl.float64), -LIMIT), LIMIT)
    scale = tl.where(moves, reach / (divisor * power_of_two(-exponent, tl.float64)), 0.0)
    return scale > 0, exponent, scale


@triton.jit
def rounded_bits(b_x, DTYPE: tl.constexpr):
    """The bits of x rounded to DTYPE, to nearest, ties to even.

    bfloat16 by integers: the interpreter would truncate.
    """
    if DTYPE.is_bf16():
        b_bits = b_x.to(tl.float32).to(tl.int32, bitcast=True)
        b_round = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
        return tl.where(b_x == b_x, b_round, 0x7FC0).to(tl.int16)
    elif DTYPE.is_fp16():
        return b_x.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        return b_x.to(DTYPE).to(tl.int64 if DTYPE.is_fp64() else tl.int32, bitcast=True)
