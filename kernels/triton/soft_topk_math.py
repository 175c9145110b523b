"""Device functions of the soft top-k kernels: the sigmoid sums of a block of rows and the scalar solver.

    S(c) = sum_i sigma(t_i) = k,    t_i = (x_i - pivot) / tau + c,    lambda = pivot - c tau

The solver is the one of kernels/common/soft_topk_solver.h, step by step: logistic-normal start, Halley on
the logit of the unsaturated entries, selection for staircases, a cubic Taylor last step. Here it runs on a
vector of rows, so every branch is a ``tl.where``; the arguments of logarithms and quotients are made
harmless where they are not used.

Blocks are [ROWS, BLOCK], state is [ROWS] in float64. `action` is 0 (done), 1 (sweep) or 2 (select).
"""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVE = tl.constexpr(8.0)
STAIRCASE = tl.constexpr(500.0)
SETTLING = tl.constexpr(1.0)
TAYLOR = tl.constexpr(0.5)
TRIALS = tl.constexpr(2)
MAX_SWEEPS = tl.constexpr(96)
REPIVOT = tl.constexpr(4.0)
PATIENCE = tl.constexpr(8)
LOST = tl.constexpr(8.9e-16)
GAP = tl.constexpr(800.0)
WINDOW = tl.constexpr(40.0)


@triton.jit
def sigmoid(b_t):
    """T = sigma(t), U = 1 - T and the signed distance of T from the nearer of 0 and 1; nothing cancels."""
    b_e = tl.exp(-tl.abs(b_t))
    b_large = 1.0 / (1.0 + b_e)
    b_small = b_e * b_large
    m_upper = b_t >= 0
    b_T = tl.where(m_upper, b_large, b_small)
    b_U = tl.where(m_upper, b_small, b_large)
    return b_T, b_U, tl.where(m_upper, -b_small, b_small)


@triton.jit
def usable_tau(tau, COMPUTE: tl.constexpr):
    """usable_tau of soft_topk_solver.h: a temperature whose reciprocal and small multiples the compute type has."""
    least: tl.constexpr = 1.5e-300 if COMPUTE.is_fp64() else 1.5e-38
    most: tl.constexpr = 1.0e300 if COMPUTE.is_fp64() else 1.0e36
    return tl.where((tau > 0) & (tau < float("inf")), tl.minimum(tl.maximum(tau, least), most), tau)


@triton.jit
def inverse_temperature(tau, COMPUTE: tl.constexpr):
    """1 / tau, kept finite and above zero, so that neither 0 * inf nor inf * 0 arises."""
    largest: tl.constexpr = 1.0e308 if COMPUTE.is_fp64() else 3.0e38
    smallest: tl.constexpr = 2.3e-308 if COMPUTE.is_fp64() else 1.2e-38
    return tl.minimum(tl.maximum(1.0 / tau, smallest), largest).to(COMPUTE)


@triton.jit
def argument(b_x, pivot, inverse_tau, c):
    """t = (x - pivot) / tau + c; x - pivot is exact near the threshold."""
    COMPUTE: tl.constexpr = b_x.dtype
    return (b_x - pivot.to(COMPUTE)[:, None]) * inverse_tau[:, None] + c.to(COMPUTE)[:, None]


@triton.jit
def row_sum(b_x):
    return tl.sum(b_x.to(tl.float64), axis=1)


@triton.jit
def row_count(m_x):
    return tl.sum(m_x.to(tl.int32), axis=1).to(tl.float64)


@triton.jit
def block_stats(b_x, m_valid, origin):
    """Counts, extremes and sums about `origin` of the finite entries; NaN and +inf are counted as bad."""
    COMPUTE: tl.constexpr = b_x.dtype
    m_bad = m_valid & ((b_x != b_x) | (b_x == float("inf")))
    m_finite = m_valid & (b_x > float("-inf")) & (b_x < float("inf"))
    b_d = tl.where(m_finite, b_x, origin.to(COMPUTE)[:, None]) - origin.to(COMPUTE)[:, None]
    low = tl.min(tl.where(m_finite, b_x, float("inf")), axis=1).to(tl.float64)
    high = tl.max(tl.where(m_finite, b_x, float("-inf")), axis=1).to(tl.float64)
    total, squares = row_sum(b_d), row_sum(b_d * b_d)
    return row_count(m_valid), row_count(m_finite), row_count(m_bad), low, high, total, squares


@triton.jit
def block_sums(b_x, pivot, inverse_tau, c):
    """SigmoidSums: #(t >= 0), sum d, W, sum w T, sum w^2, #active, #(t > ACTIVE), sum d beyond ACTIVE."""
    b_t = argument(b_x, pivot, inverse_tau, c)
    b_T, b_U, b_d = sigmoid(b_t)
    b_w = b_T * b_U
    m_active = tl.abs(b_t) <= ACTIVE
    upper, active, outer_upper = row_count(b_t >= 0), row_count(m_active), row_count(b_t > ACTIVE)
    d, outer_d = row_sum(b_d), row_sum(tl.where(m_active, 0.0, b_d))
    W = tl.sum(b_w, axis=1).to(tl.float64)
    wT = tl.sum(b_w * b_T, axis=1).to(tl.float64)
    ww = tl.sum(b_w * b_w, axis=1).to(tl.float64)
    return upper, d, W, wT, ww, active, outer_upper, outer_d


@triton.jit
def block_marginals(b_x, pivot, inverse_tau, c):
    """sum T and sum (1 - T) of the finite entries, for the Sinkhorn recursion."""
    b_T, b_U, _ = sigmoid(argument(b_x, pivot, inverse_tau, c))
    return row_sum(b_T), row_sum(tl.where(b_x > float("-inf"), b_U, 0.0))


@triton.jit
def logit(above, below):
    return tl.log(above / below)


@triton.jit
def round_to(value, COMPUTE: tl.constexpr):
    """round_to_compute of soft_topk_solver.h: a number of the compute type, the largest where the value lies beyond."""
    largest: tl.constexpr = 1.7976931348623157e308 if COMPUTE.is_fp64() else 3.4028234663852886e38
    return tl.minimum(tl.maximum(value, -largest), largest).to(COMPUTE).to(tl.float64)


@triton.jit
def classify(valid, finite, bad_entries, k, tau):
    """Rows without a root: fill, threshold, residual. For the others k, n and tau, harmless elsewhere."""
    bad = (bad_entries > 0) | (k != k) | (k < 0) | (k > valid) | (tau != tau) | (tau <= 0) | (tau == float("inf"))
    empty = (k == 0) & (bad == 0)
    full = (k >= finite) & (k > 0) & (bad == 0)
    saturated = bad | empty | full
    fill = tl.where(bad, float("nan"), tl.where(full, 1.0, 0.0))
    edge = tl.where(bad, float("nan"), tl.where(full, float("-inf"), float("inf")))
    residual = tl.where(bad, float("nan"), tl.where(full, finite - k, 0.0))
    k = tl.where(saturated, 1.0, k)
    n = tl.where(saturated, 2.0, finite)
    return saturated, fill, edge, residual, k, n, tl.where(saturated, 1.0, tau)


@triton.jit
def start(low, high, mean, var, k, n, tau, saturated, COMPUTE: tl.constexpr):
    """ThresholdSolver::start for the rows with a root."""
    low, high = tl.where(saturated, 0.0, low), tl.where(saturated, 0.0, high)
    L = logit(k, n - k)
    guess = mean - tau * L * tl.sqrt(1.0 + 0.39269908169872414 * (var / (tau * tau)))
    first, last = low - tau * L, high - tau * L
    guess = tl.where((guess >= first) & (guess <= last), guess, 0.5 * first + 0.5 * last)
    pivot = round_to(guess, COMPUTE)
    c = (pivot - guess) / tau
    lo, hi = (pivot - high) / tau + L, (pivot - low) / tau + L
    action = tl.where(saturated, 0, tl.where(hi - lo > STAIRCASE, 2, 1))
    return action, pivot, c, lo, hi


@triton.jit
def window_shift(c, low, high, pivot, tau):
    """ThresholdSolver::move_into_window: what moves a Sinkhorn iterate to where its T or 1 - T do not underflow."""
    top, bottom = (high - pivot) / tau + c, (low - pivot) / tau + c
    return tl.where(top < -WINDOW, -WINDOW - top, tl.where(bottom > WINDOW, WINDOW - bottom, 0.0))


@triton.jit
def sinkhorn_step(c, shift, taken, left, low, high, pivot, k, n, tau):
    """c_{t+1} = c_t + logit(k/n) - logit(S_t/n), from the sums of a sweep at c = c_t + shift; and the next shift."""
    log_T = tl.where(shift < 0, tl.log(n), tl.log(tl.where(shift < 0, 1.0, taken)) - shift)
    log_U = tl.where(shift > 0, tl.log(n), tl.log(tl.where(shift > 0, 1.0, left)) + shift)
    c += tl.log(k) - tl.log(n - k) - log_T + log_U - shift
    shift = window_shift(c, low, high, pivot, tau)
    return c + shift, shift


@triton.jit
def moved_bracket(lo, hi, shift):
    """The bracket from another pivot, wider by what its ends lose in rounding."""
    lost = LOST * tl.abs(shift)
    return lo + shift - lost, hi + shift + lost


@triton.jit
def repivot(on, pivot, c, lo, hi, tau, COMPUTE: tl.constexpr):
    """Keeps |c| small, so that x + c is as exact as x."""
    moved = round_to(pivot - c * tau, COMPUTE)
    shift = (moved - pivot) / tau
    on = on & (tl.abs(c) > REPIVOT) & (tl.abs(c + shift) < tl.abs(c))
    shift = tl.where(on, shift, 0.0)
    lo, hi = moved_bracket(lo, hi, shift)
    return tl.where(on, moved, pivot), c + shift, lo, hi


@triton.jit
def start_at(above, equal, gap, k, excess):
    """c for a row of the tied group at the selected value, the pivot, and the next score, `gap` tau below; with
    `excess` = k - above - equal > 0 the pivot is that score."""
    share = tl.minimum((k - above) / equal, 1.0)
    half = tl.minimum(0.5 * (gap + tl.log(equal)), GAP)
    inner = tl.where(share < 1.0, share, 0.5)
    c_tied = tl.where(share < 1.0, tl.minimum(logit(inner, 1.0 - inner), half), half)
    return tl.where(excess > 0, tl.maximum(tl.log(tl.where(excess > 0, excess, 1.0)), half - gap), c_tied)


@triton.jit
def after_selection(on, value, above, equal, below, pivot, c, lo, hi, k, tau, COMPUTE: tl.constexpr):
    """ThresholdSolver::after_selection for the rows in `on`."""
    value = tl.where(on, value, pivot)
    below = tl.where(on, below, value)
    gap = (value - below) / tau
    above, equal, k = tl.where(on, above, 0.0), tl.where(on, equal, 1.0), tl.where(on, k, 1.0)
    excess = (k - above) - equal
    target = start_at(above, equal, gap, k, excess)
    value = tl.where(excess > 0, below, value)
    shift = (value - pivot) / tau
    lo, hi = moved_bracket(lo, hi, shift)
    c = tl.where(on, tl.minimum(tl.maximum(target, lo), hi), c)
    return repivot(on, value, c, lo, hi, tau, COMPUTE)


@triton.jit
def saturated_step(r, W, wT):
    """ThresholdSolver::saturated_step, two exponentials where what is active cannot make up r; and its validity."""
    A, B = wT, W - wT
    p = 0.5 * ((r + A) - B)
    larger = tl.abs(p) + tl.sqrt(p * p + A * B)
    above, below = tl.where(p > 0, A, larger), tl.where(p > 0, larger, B)
    ok = (above > 0) & (below > 0)
    return logit(tl.where(ok, above, 1.0), tl.where(ok, below, 1.0)), ok


@triton.jit
def halley(r, W, wT, count, rest, m, k):
    """One Halley step on logit((S - P0)/m) - logit((k - P0)/m), P0 = count + rest; and its validity."""
    b = (k - count) - rest
    a = b + r
    ok = (a > 0) & (a < m) & (b > 0) & (b < m) & (W > 0)
    a, b, m, W = tl.where(ok, a, 1.0), tl.where(ok, b, 1.0), tl.where(ok, m, 2.0), tl.where(ok, W, 1.0)
    v = a * (m - a) / m
    d1 = W / v
    d2 = (W - 2 * tl.where(ok, wT, 0.0)) / v - (1 - 2 * a / m) * d1 * d1
    h = logit(a * (m - b), b * (m - a)) / d1
    return tl.where(ok, -h / tl.minimum(tl.maximum(1 - 0.5 * h * d2 / d1, 0.4), 2.5), 0.0), ok


@triton.jit
def taylor_step(r, W, wT, ww, guess):
    """Solves r + W d + (W - 2 wT) d^2/2 + (W - 6 ww) d^3/6 = 0 near `guess`."""
    d2, d3 = W - 2 * wT, W - 6 * ww
    d = guess
    for _ in tl.static_range(3):
        f = r + d * (W + d * (0.5 * d2 + d * (d3 / 6)))
        slope = W + d * (d2 + 0.5 * d * d3)
        good = slope > 0.25 * W
        d = tl.where(good, d - f / tl.where(good, slope, 1.0), d)
    return d


@triton.jit
def after_sweep(
    on, upper, d, W, wT, ww, active, outer_upper, outer_d,
    action, pivot, c, lo, hi, trials, selected, k, n, tau, COMPUTE: tl.constexpr,
):  # fmt: skip
    """ThresholdSolver::after_sweep for the rows in `on`; the others keep their state."""
    tolerance: tl.constexpr = 1e-16 if COMPUTE.is_fp64() else 1e-8
    final_step: tl.constexpr = 1e-3 if COMPUTE.is_fp64() else 0.02
    trials += on.to(tl.int32)
    r = (upper - k) + d
    hi = tl.where(on & (r >= 0) & (c < hi), c, hi)
    lo = tl.where(on & (r <= 0) & (c > lo), c, lo)
    # Moving c to the root changes the weights by |r| in all: a hard selection, where any c of the gap will do.
    scale = tl.minimum(1.0, tl.minimum(k, n - k))
    there = (tl.abs(r) <= tolerance * scale) | (trials >= MAX_SWEEPS)
    # Near the end Newton's step is as good as Halley's: the cubic finishes.
    newton = tl.where(W > 0, -r / tl.where(W > 0, W, 1.0), float("inf"))
    last = tl.abs(newton) <= final_step

    local_step, local_ok = halley(r, W, wT, outer_upper, outer_d, active, k)
    saturated_step_, saturated_ok = saturated_step(r, W, wT)
    saturated_ok = saturated_ok & (active < n)
    ok = local_ok | saturated_ok
    step = tl.where(last, newton, tl.where(local_ok, local_step, saturated_step_))
    near = last | (ok & (tl.abs(step) <= TAYLOR))
    step = tl.where(near, taylor_step(r, W, wT, ww, tl.where(near, step, 0.0)), step)

    inside = ok & (c + step >= lo) & (c + step <= hi)
    unsettled = (trials >= TRIALS) & (tl.abs(step) > SETTLING)
    select = (selected == 0) & ((inside == 0) | unsettled)
    # Steps that are still needed by then go astray or creep: every other one halves the bracket, so that rows end.
    astray = (trials > PATIENCE) & (trials % 2 == 1)
    free = inside & (astray == 0)
    bisect = (ok == 0) | astray
    halved = 0.5 * (tl.where(bisect, lo, c) + tl.where((step < 0) & (bisect == 0), lo, hi))
    stuck = (free == 0) & (halved == c)  # the bracket is at rounding level
    output = there | last | ((select == 0) & stuck)
    target = tl.where(last | tl.where(select, inside, free), c + step, tl.where(select, c, halved))
    c = tl.where(on & (there == 0), target, c)
    action = tl.where(on, tl.where(output, 0, tl.where(select, 2, 1)), action)
    pivot, c, lo, hi = repivot(on & (action == 1), pivot, c, lo, hi, tau, COMPUTE)
    return action, pivot, c, lo, hi, trials


@triton.jit
def ordered_key(b_x, BITS: tl.constexpr):
    """Unsigned keys in the order of the numbers (no NaN, no -0)."""
    if BITS == 64:
        b_bits = b_x.to(tl.uint64, bitcast=True)
        return tl.where((b_bits >> 63) != 0, ~b_bits, b_bits | 0x8000000000000000)
    else:
        b_bits = b_x.to(tl.uint32, bitcast=True)
        return tl.where((b_bits >> 31) != 0, ~b_bits, b_bits | 0x80000000)


@triton.jit
def value_of_key(key, BITS: tl.constexpr):
    if BITS == 64:
        return tl.where((key >> 63) != 0, key & 0x7FFFFFFFFFFFFFFF, ~key).to(tl.float64, bitcast=True)
    else:
        return tl.where((key >> 31) != 0, key & 0x7FFFFFFF, ~key).to(tl.float32, bitcast=True)


@triton.jit
def selection_rank(k):
    """The rank to select: where k is a hair above an integer, as 0.07 n can be, that integer and not the next."""
    return tl.maximum(tl.ceil(k - 0.5), 1.0)


@triton.jit
def select_in_block(on, b_x, low, high, k):
    """The entry of the selection_rank by bisection on the keys: max {v : #(x >= v) >= rank}."""
    COMPUTE: tl.constexpr = b_x.dtype
    BITS: tl.constexpr = COMPUTE.primitive_bitwidth
    rank = selection_rank(k)
    first = ordered_key(tl.where(on, low, 0.0).to(COMPUTE), BITS)
    last = ordered_key(tl.where(on, high, 0.0).to(COMPUTE), BITS) + 1
    while tl.max((last - first > 1).to(tl.int32), axis=0) > 0:
        middle = first + ((last - first) >> 1)
        enough = row_count(b_x >= value_of_key(middle, BITS)[:, None]) >= rank
        open_ = last - first > 1
        first = tl.where(open_ & enough, middle, first)
        last = tl.where(open_ & (enough == 0), middle, last)
    value = value_of_key(first, BITS)
    below = tl.max(tl.where(b_x < value[:, None], b_x, float("-inf")), axis=1)
    above, equal = row_count(b_x > value[:, None]), row_count(b_x == value[:, None])
    return value.to(tl.float64), above, equal, below.to(tl.float64)
