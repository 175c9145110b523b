"""What the attention kernels do with a block: loads, scores, dropout, products. See attention.py.

    x_ij = scale q_i . k_j + b_ij, in base 2: x log2(e);   -inf where key j takes no part for query i

Queries and keys are counted from the start of their own sample. Offsets within a block are int32, from a pointer to
its first entry: the launchers copy an array whose strides are too large for that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_arguments import LOG2_E

LOG2E = tl.constexpr(LOG2_E)
# The interpreter multiplies the bits of bfloat16 as integers and rounds to it towards zero.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def sample_of(samples, b):
    """(first token in the array, tokens that count, tokens that exist) of sample b."""
    if samples.cu_seqlens is not None:
        first = tl.load(samples.cu_seqlens + b)
        count = tl.load(samples.cu_seqlens + b + 1) - first
        return first.to(tl.int64), count, count
    elif samples.lengths is not None:
        length = tl.load(samples.lengths + b)
        count = tl.minimum(tl.maximum(length, 0), samples.longest).to(tl.int32)
        return tl.full((), 0, tl.int64), count, samples.longest
    else:
        return tl.full((), 0, tl.int64), samples.longest, samples.longest


@triton.jit
def rows_of(samples, first, i_start, b, h, heads):
    """Row of token i_start of (b, h), and rows from token to token, in a contiguous [B, H, L, ...] or [T, H, ...]."""
    if samples.cu_seqlens is not None:
        return (first + i_start) * heads + h, heads
    else:
        return (b.to(tl.int64) * heads + h) * samples.longest + i_start, 1


@triton.jit
def rows_at(array, b, h, first):
    """(pointer to token `first` of (b, h), stride of the tokens): rows of WIDTH entries."""
    return array.ptr + b.to(tl.int64) * array.batch + h.to(tl.int64) * array.head + first * array.token, array.token


@triton.jit
def load_rows(rows, m_tokens, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, COLUMN: tl.constexpr = 0):
    """[tokens, BLOCK_D], columns from COLUMN on; zeros where `m_tokens` is false and past the width."""
    start, step = rows
    i_entry = tl.arange(0, m_tokens.shape[0])[:, None] * step + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(start + COLUMN + i_entry, mask=inside(m_tokens, WIDTH - COLUMN, BLOCK_D), other=0.0)


@triton.jit
def row_products(inputs, left, m_left, b_left, right, m_right, b_right):
    """[left tokens, right tokens] of products of rows, which are also loaded, as b_left and b_right.

    A product of float32 holds both its factors in registers, twice, which long rows have no room for: these are read
    again a chunk at a time.
    """
    b_sum = tl.zeros([m_left.shape[0], m_right.shape[0]], tl.float32)
    if inputs.CHUNK < inputs.BLOCK_D:
        for i_chunk in tl.static_range(0, inputs.BLOCK_D, inputs.CHUNK):
            b_first = load_rows(left, m_left, inputs.WIDTH, inputs.CHUNK, i_chunk)
            b_second = load_rows(right, m_right, inputs.WIDTH, inputs.CHUNK, i_chunk)
            b_sum = product(b_first, tl.trans(b_second), b_sum)
        return b_sum
    else:
        return product(b_left, tl.trans(b_right), b_sum)


@triton.jit
def store_rows(ptr, row, step, m_tokens, b_value, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """[tokens, BLOCK_D] into the contiguous rows row + step i."""
    i_entry = tl.arange(0, m_tokens.shape[0])[:, None] * (step * WIDTH) + tl.arange(0, BLOCK_D)[None, :]
    b_narrow = narrow(b_value, ptr.dtype.element_ty)
    tl.store(ptr + row * WIDTH + i_entry, b_narrow, mask=inside(m_tokens, WIDTH, BLOCK_D))


@triton.jit
def inside(m_tokens, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    if WIDTH < BLOCK_D:
        return m_tokens[:, None] & (tl.arange(0, BLOCK_D) < WIDTH)[None, :]
    else:
        return m_tokens[:, None]


@triton.jit
def load_keys(inputs, b, h, first, i_start, count, EXACT: tl.constexpr, BLOCK_N: tl.constexpr):
    """m, and which keys take part; EXACT: those of weight 0 too. m is 0 elsewhere, whatever is stored there."""
    i_block = tl.arange(0, BLOCK_N)
    m_keys = i_start + i_block < count
    if inputs.mask.ptr is not None:
        mask_ptr = inputs.mask.ptr + b.to(tl.int64) * inputs.mask.batch + (first + i_start) * inputs.mask.token
        m_keys = m_keys & (tl.load(mask_ptr + i_block * inputs.mask.token, mask=m_keys, other=0) != 0)
    if inputs.weights.ptr is not None:
        m_ptr = inputs.weights.ptr + b.to(tl.int64) * inputs.weights.batch + h.to(tl.int64) * inputs.weights.head
        m_ptr += (first + i_start) * inputs.weights.token
        b_m = tl.load(m_ptr + i_block * inputs.weights.token, mask=m_keys, other=0.0)
        if not EXACT:
            m_keys = m_keys & (b_m != 0)
        return b_m, m_keys
    else:
        return tl.where(m_keys, 1.0, 0.0), m_keys


@triton.jit
def load_key_exponents(inputs, b, h, first, i_start, count, BLOCK_N: tl.constexpr):
    """log2 m, -inf where a key takes no part, and which keys take part.

    In the score, and so in the running maximum, a weight takes no digits from p in the type of the products, nor sums
    out of range, where a query sees small weights alone. A weight below 0, which has no meaning, shows as NaN.
    """
    b_m, m_keys = load_keys(inputs, b, h, first, i_start, count, False, BLOCK_N)
    if inputs.weights.ptr is None:
        return tl.where(m_keys, 0.0, float("-inf")), m_keys
    elif INTERPRETED:  # NumPy warns of the others
        b_exponent = tl.log2(tl.where(b_m > 0, b_m, 1.0))
        return tl.where(b_m > 0, b_exponent, tl.where(b_m == 0, float("-inf"), float("nan"))), m_keys
    else:
        return tl.log2(b_m), m_keys


@triton.jit
def scores(inputs, b, h, b_qk, i_query, i_key, i_rows, i_cols, m_queries, m_keys, b_exponent):
    """x in base 2 of a block of products q . k, from query `i_query` and key `i_key`, at offsets `i_rows`, `i_cols`.

    `b_exponent` is added: -inf at excluded keys, whose products are zeros.
    """
    if inputs.bias.ptr is not None:
        bias_ptr = inputs.bias.ptr + b.to(tl.int64) * inputs.bias.batch + h.to(tl.int64) * inputs.bias.head
        bias_ptr += tl.cast(i_query, tl.int64) * inputs.bias.query + tl.cast(i_key, tl.int64) * inputs.bias.key
        i_entry = i_rows * inputs.bias.query + i_cols * inputs.bias.key
        b_added = tl.load(bias_ptr + i_entry, mask=m_queries & m_keys, other=float("-inf")) * LOG2E
        b_added += b_exponent
    else:
        b_added = b_exponent
    b_x = b_qk * (inputs.scale * LOG2E) + b_added
    if inputs.CAUSAL:
        b_x = tl.where(i_key + i_cols <= i_query + i_rows, b_x, float("-inf"))
    return b_x


@triton.jit
def kept(dropout, b, h, i_query, i_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which entries [BLOCK_M, BLOCK_N] dropout keeps, from query `i_query` and key `i_key`, a multiple of 8.

    Half j mod 8 of Philox4x32-7 for the counter (j div 8, i, h, b), as in ops/philox.py: a draw serves eight keys.
    """
    i_group = (i_key // 8 + tl.arange(0, BLOCK_N // 8))[None, :]
    i_groups, i_rows = tl.broadcast(i_group, (i_query + tl.arange(0, BLOCK_M))[:, None])
    word0, word1, word2, word3 = tl.philox(tl.load(dropout.seed), i_groups, i_rows, h, b, n_rounds=7)
    b_half0 = _kept_of_word(word0, dropout.dropped) | _kept_of_word(word1, dropout.dropped) << 2
    b_half1 = _kept_of_word(word2, dropout.dropped) | _kept_of_word(word3, dropout.dropped) << 2
    b_bits = tl.interleave(b_half0, b_half1)
    b_bits = tl.interleave(b_bits, b_bits >> 2)
    return (tl.interleave(b_bits, b_bits >> 1) & 1) != 0


@triton.jit
def _kept_of_word(word, dropped):
    """Bit i: whether half i of a word is kept."""
    return ((word & 0xFFFF) >= dropped).to(tl.int8) | ((word >> 16) >= dropped).to(tl.int8) << 1


@triton.jit
def product(b_left, b_right, b_sum):
    """b_sum + b_left b_right, summed in float32; float32 factors as three products of tf32."""
    if INTERPRETED:
        return tl.dot(b_left.to(tl.float32), b_right.to(tl.float32), b_sum, input_precision="ieee")
    else:
        return tl.dot(b_left, b_right, b_sum, input_precision="tf32x3")


@triton.jit
def narrow(b_x, dtype: tl.constexpr):
    """float32 rounded to the nearest of `dtype`."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = b_x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(b_x == b_x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return b_x.to(dtype)


@triton.jit
def load_statistics(statistics, row, step, m_queries):
    """lse in base 2 and delta; 0 beyond the queries that count, whose do = 0 makes every gradient 0."""
    i_row = tl.arange(0, m_queries.shape[0]) * step
    lse = tl.load(statistics.lse + row + i_row, mask=m_queries, other=0.0)
    return lse, tl.load(statistics.delta + row + i_row, mask=m_queries, other=0.0)


@triton.jit
def score_slopes(inputs, b, h, b_qk, b_dp, b_exponent, i_query, i_key, m_queries, m_keys, lse, delta):
    """ds = p (dP - delta) of a block [queries, keys] from query `i_query` and key `i_key`; b_dp is do . v."""
    BLOCK_M: tl.constexpr = b_qk.shape[0]
    BLOCK_N: tl.constexpr = b_qk.shape[1]
    i_rows, i_cols = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    b_x = scores(
        inputs, b, h, b_qk, i_query, i_key, i_rows, i_cols, m_queries[:, None], m_keys[None, :], b_exponent[None, :]
    )
    b_p = tl.exp2(b_x - lse[:, None])
    if inputs.dropout.seed is not None:
        m_kept = kept(inputs.dropout, b, h, i_query, i_key, BLOCK_M, BLOCK_N)
        b_dp = tl.where(m_kept, b_dp * inputs.dropout.factor, 0.0)
    # A query without a key has p = 0, and may have any dP, NaN too.
    return tl.where(b_p == 0.0, 0.0, b_p * (b_dp - delta[:, None]))
