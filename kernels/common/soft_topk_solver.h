// The scalar half of the soft top-k solver, shared by every compiled backend.
//
// A row's plan has one unknown, c (math.md section 1):
//
//     S(c) = sum_i sigma(x_i + c) = k,     x_i = (s_i - p) / tau,     lambda = p - c tau
//
// The vector half sweeps a row and returns sums; this file turns sums into the next c. The pivot p is a number of
// the scores' own type near lambda: s_i - p is then exact where it matters, however small tau is against the scores.
//
// 1. One sweep for count, mean, variance, extremes. First guess: the quantile of a logistic-normal,
//    lambda = mean - tau L sqrt(1 + pi/8 var/tau^2), L = logit(k/n).
// 2. Halley steps on logit((S - P0)/m) - logit((k - P0)/m), where m entries have |x_i + c| <= kActive and the others,
//    saturated, contribute P0. With m = n this is Newton on logit(mean), i.e. Sinkhorn with the right step length;
//    with m < n it sees a local plateau (ties, clusters) as the logistic that it is. A bracket guards every step.
// 3. Where the row is a staircase at the scale of tau (spread/tau > kStaircase) or two steps did not come near, the
//    k-th largest score is selected by radix (three counting sweeps), and step 2 goes on from there. Where step 2 has
//    no answer, because what is active cannot make up the difference, two exponentials have (saturated_step).
// 4. Once |step| <= final_step the Taylor polynomial of S, whose coefficients the sums give, is solved for the last
//    step; its remainder is below rounding. The weights are sigma there: computed afresh, or moved from the last
//    sweep's own by last_step. The polynomial is a cubic; a backend whose first sweep takes further sums where near()
//    says that they will do (SigmoidSums::high) has degree 7, which ends most such rows after that sweep.
//
// At most 10 sweeps in all on the families of tests/ops/test_soft_topk_convergence.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace mmer {
inline namespace MMER_VARIANT {

// Sums of one statistics sweep over the valid entries (in the order of selection: sign already applied).
struct RowStats {
  double valid = 0;                            // entries inside lengths/mask
  double finite = 0;                           // of these, not -inf
  double min = 0, max = 0, mean = 0, var = 0;  // of the finite ones
  bool poisoned = false;                       // a NaN or +inf among the valid entries
};

// Sums of one sigmoid sweep at c; w = T (1 - T). A float32 sum of T would drown the few entries that matter in the
// many that are near 1. So sweeps sum the distance to the nearest of 0 and 1, d_i = T_i for t_i < 0 and T_i - 1
// otherwise, beside an exact count: S = #(t >= 0) + sum d.
struct SigmoidSums {
  double upper = 0;        // entries with t >= 0
  double d = 0;            // sum d
  double W = 0;            // sum w           S'   = W
  double wT = 0;           // sum w T         S''  = W - 2 wT
  double ww = 0;           // sum w^2         S''' = W - 6 ww
  double active = 0;       // entries with |t| <= kActive
  double outer_upper = 0;  // entries with t > kActive
  double outer_d = 0;      // sum d over entries with |t| > kActive
  bool high = false;       // whether those below were summed too
  double wwT = 0;          // sum w^2 T       S4 = W - 2 wT - 12 ww + 24 wwT
  double www = 0;          // sum w^3         S5 = W - 30 ww + 120 www
  double wwwT = 0;         // sum w^3 T       S6 = W - 2 wT - 60 ww + 120 wwT + 360 www - 720 wwwT
  double wwww = 0;         // sum w^4         S7 = W - 126 ww + 1680 www - 5040 wwww

  MMER_HD double residual(double k) const { return (upper - k) + d; }
};

// Result of the selection sweeps: v is the selection_rank()-th largest score.
struct Selection {
  double value = 0;
  double above = 0;  // entries > v
  double equal = 0;  // entries == v
  double below = 0;  // largest entry < v, or -infinity
};

MMER_HD double soft_topk_logit(double above, double below) { return log(above / below); }

// Unlike fmin and fmax no calls, on any compiler.
MMER_HD double lesser_of(double a, double b) { return a < b ? a : b; }
MMER_HD double greater_of(double a, double b) { return a > b ? a : b; }

// A pivot for a finite threshold: the nearest number of the compute type. A threshold may lie beyond all floats where
// scores or tau are nearly so large.
MMER_HD double round_to_compute(double threshold, bool compute_float) {
  constexpr double largest = 3.4028234663852886e38;
  if (!compute_float) return threshold;
  const double near = threshold > largest ? largest : (threshold < -largest ? -largest : threshold);
  return static_cast<double>(static_cast<float>(near));
}

// A temperature whose reciprocal and small multiples the compute type has: below, differences of scores that count as
// none would grow beyond any bound; above, a threshold would. What is no temperature stays what it is.
MMER_HD double usable_tau(double tau, bool compute_float) {
  const double least = compute_float ? 1.5e-38 : 1.5e-300, most = compute_float ? 1e36 : 1e300;
  if (!(tau > 0 && tau < INFINITY)) return tau;
  return tau < least ? least : (tau > most ? most : tau);
}

struct ThresholdSolver {
  static constexpr double kActive = 8.0;
  static constexpr double kStaircase = 500.0;
  static constexpr double kSettling = 1.0;  // a step beyond this after kTrials sweeps asks for selection
  static constexpr double kTaylor = 0.5;    // steps within it are refined by the cubic
  static constexpr int kTrials = 2;
  static constexpr int kPatience = 8;    // sigmoid sweeps of which no row should need as many
  static constexpr int kMaxSweeps = 96;  // bisection ends long before; a bound so that nothing can hang
  static constexpr double kRepivot = 4.0;
  static constexpr double kWindow = 40.0;
  static constexpr double kLost = 8.9e-16;  // 2^-50, relative to the distance that a bracket moves
  static constexpr double kGap = 800.0;     // as far from a score every weight is 0 or 1 exactly, and its slope 0

  enum class Action { kSweep, kSelect, kOutput };

  double k = 0, n = 0, tau = 1;
  double final_step = 0.02;  // Newton's, for float32 sums; 1e-3 for float64. The remainder is 1e-8 of a weight at most
  double high_step = 0.33;   // the same with high sums; 0.03 for float64
  double pivot = 0;          // p, representable in the compute type
  double c = 0, lo = 0, hi = 0;
  double last_step = 0;    // of c, after the last sigmoid sweep; about final_step or, with high sums, high_step at most
  double shift = 0;        // in c, of a Sinkhorn sweep (move_into_window)
  double logit_share = 0;  // logit(k/n)
  double spread = 0;       // variance of the scores, in units of tau^2
  int sweeps = 0;          // over the row's scores, of any kind
  int trials = 0;
  bool selected = false;
  bool saturated = false;  // no root inside: all 0, all 1 or NaN; then `fill`
  double fill = 0;         // T of every finite entry when saturated
  double threshold_fill = 0;

  // Decides the rows that need no root. `compute_float`: the row is swept in float32.
  MMER_HD Action start(const RowStats& stats, double k_, double tau_, bool compute_float) {
    k = k_;
    tau = tau_;
    n = stats.finite;
    final_step = compute_float ? 0.02 : 1e-3;
    high_step = compute_float ? 0.33 : 0.03;
    sweeps = 1;
    const bool bad = stats.poisoned || !(k >= 0) || !(k <= stats.valid) || !(tau > 0) || !(tau < INFINITY);
    if (bad) return saturate(NAN, NAN);
    if (k == 0) return saturate(0.0, INFINITY);
    if (k >= n) return saturate(1.0, -INFINITY);
    const double L = logit_share = soft_topk_logit(k, n - k);
    const double z = spread = stats.var / (tau * tau);
    double lambda = stats.mean - tau * L * sqrt(1.0 + 0.39269908169872414 * z);
    const double lo_lambda = stats.min - tau * L, hi_lambda = stats.max - tau * L;
    if (!(lambda >= lo_lambda && lambda <= hi_lambda)) lambda = 0.5 * lo_lambda + 0.5 * hi_lambda;
    pivot = round_to_compute(lambda, compute_float);
    c = (pivot - lambda) / tau;
    lo = (pivot - stats.max) / tau + L;
    hi = (pivot - stats.min) / tau + L;
    if (hi - lo > kStaircase) return Action::kSelect;
    return Action::kSweep;
  }

  // The Sinkhorn recursion starts from v = (1/2, 1/2): lambda = sign/2.
  MMER_HD Action start_sinkhorn(const RowStats& stats, double k_, double tau_, double sign) {
    const Action action = start(stats, k_, tau_, false);
    if (saturated) return action;
    pivot = 0.5 * sign;
    c = 0;
    move_into_window(stats);
    return Action::kSweep;
  }

  // c_{t+1} = c_t + logit(k/n) - logit(S_t/n), with sum (1 - T) given apart so that neither logarithm cancels.
  MMER_HD void sinkhorn_step(double sum_T, double sum_U, const RowStats& stats) {
    ++sweeps;
    const double log_T = shift < 0 ? log(n) : log(sum_T) - shift;
    const double log_U = shift > 0 ? log(n) : log(sum_U) + shift;
    c += logit_share - log_T + log_U - shift;
    move_into_window(stats);
  }

  // sum T - k at the Sinkhorn iterate, from the sums of its sweep.
  MMER_HD double sinkhorn_residual(double sum_T) const { return (shift > 0 ? sum_T * exp(-shift) : sum_T) - k; }

  // The rank of the entry that selection should find: where k is a hair above an integer, as 0.07 n can be in floating
  // point, the entry of that integer and not the next.
  MMER_HD static double selection_rank(double k) { return k > 1.0 ? ceil(k - 0.5) : 1.0; }

  MMER_HD Action after_selection(const Selection& sel, bool compute_float) {
    selected = true;
    sweeps += 3;
    const double excess = (k - sel.above) - sel.equal;
    rebase(excess > 0 ? sel.below : sel.value);
    c = start_at(sel, excess);
    clamp();
    repivot(compute_float);
    return Action::kSweep;
  }

  MMER_HD Action after_sweep(const SigmoidSums& s, bool compute_float) {
    ++sweeps;
    ++trials;
    const double r = s.residual(k);
    if (r >= 0 && c < hi) hi = c;
    if (r <= 0 && c > lo) lo = c;
    // Moving c to the root changes the weights by |r| in all: a hard selection, where any c of the gap will do.
    const double scale = lesser_of(1.0, lesser_of(k, n - k));
    if (fabs(r) <= (compute_float ? 1e-8 : 1e-16) * scale || sweeps >= kMaxSweeps) return Action::kOutput;

    // Near the end Newton's step is as good as Halley's, and needs no logarithm: the polynomial finishes.
    const double newton = -r / s.W;
    if (fabs(newton) <= (s.high ? high_step : final_step)) {
      last_step = s.high ? septic_step(s, r, newton) : cubic_step(s, r, newton);
      c += last_step;
      return Action::kOutput;
    }
    double step = halley(s, r, s.outer_upper, s.outer_d, s.active);
    if (!(step == step) && s.active < n) step = saturated_step(s, r);
    if (fabs(step) <= kTaylor) step = cubic_step(s, r, step);
    const bool inside = c + step >= lo && c + step <= hi;
    if (!selected && (!inside || (trials >= kTrials && fabs(step) > kSettling))) {
      if (inside) c += step;
      return Action::kSelect;
    }
    // Steps that are still needed by then go astray or creep: every other one halves the bracket, so that every row
    // ends.
    const bool astray = trials > kPatience && trials % 2 == 1;
    if (inside && !astray) {
      c += step;
    } else {
      const double next = !(step == step) || astray ? 0.5 * (lo + hi) : 0.5 * (c + (step < 0 ? lo : hi));
      if (next == c) return Action::kOutput;  // the bracket is at rounding level
      c = next;
    }
    repivot(compute_float);
    return Action::kSweep;
  }

  // Whether the first guess is likely to lie within high_step: as the quantile of a sample does from that of the
  // distribution, it misses by some 1.2 sqrt(spread/n).
  MMER_HD bool near() const { return trials == 0 && !selected && spread < 0.06 * n; }

  MMER_HD double threshold() const { return saturated ? threshold_fill : pivot - (c - shift) * tau; }

 private:
  MMER_HD Action saturate(double value, double lambda) {
    saturated = true;
    fill = value;
    threshold_fill = lambda;
    return Action::kOutput;
  }

  // A Sinkhorn iterate may lie so far from every score that all T, or all 1 - T, underflow. They are e^t, or e^-t,
  // there: a sweep at c + shift, with the nearest score kWindow away, has them all times the same e^shift.
  MMER_HD void move_into_window(const RowStats& stats) {
    const double top = (stats.max - pivot) / tau + c, bottom = (stats.min - pivot) / tau + c;
    shift = top < -kWindow ? -kWindow - top : (bottom > kWindow ? kWindow - bottom : 0.0);
    c += shift;
  }

  // c for a row that has nothing but the tied group at v (`equal` entries, 0.5 < k - above) and the next score below
  // it, `gap` tau away; excess = k - above - equal is left for that score. From the pivot v it is the root of
  //     excess = e^(c - gap) - equal e^-c,
  // both groups being saturated at the root, or logit(share) where v is not. Where something is left for the next score
  // the pivot is that one: c - gap would lose what counts.
  MMER_HD double start_at(const Selection& sel, double excess) const {
    const double gap = (sel.value - sel.below) / tau;
    const double half = lesser_of(0.5 * (gap + log(sel.equal)), kGap);
    if (excess <= 0) {
      const double share = (k - sel.above) / sel.equal;
      return share < 1.0 ? lesser_of(soft_topk_logit(share, 1.0 - share), half) : half;
    }
    return greater_of(log(excess), half - gap);
  }

  // Root of f(c) = (upper - k) - A e^-c + B e^c, where all entries are saturated: A what is missing to 1 above the
  // threshold, B what there is below it. Newton would creep along either exponential by 1 a step.
  MMER_HD static double saturated_step(const SigmoidSums& s, double r) {
    const double A = s.wT, B = s.W - s.wT;
    const double p = 0.5 * ((r + A) - B), larger = fabs(p) + sqrt(p * p + A * B);
    // y = e^c solves B y^2 + 2 p y - A = 0; of the two forms, the one that does not cancel.
    return p > 0 ? log(A / larger) : log(larger / B);
  }

  MMER_HD void clamp() {
    if (!(c >= lo)) c = lo;
    if (!(c <= hi)) c = hi;
  }

  // Keeps |c| small, so that x + c is as exact as x.
  MMER_HD void repivot(bool compute_float) {
    if (fabs(c) <= kRepivot) return;
    const double next = round_to_compute(pivot - c * tau, compute_float);
    if (fabs(c + (next - pivot) / tau) < fabs(c)) rebase(next);
  }

  // Counts c from another pivot. The bracket widens by what its ends lose in rounding, which is more than all of c
  // where the pivot moves by 2^52 tau. An end that overflowed stays infinite: inf - inf would make it NaN.
  MMER_HD void rebase(double next) {
    const double shift = (next - pivot) / tau, lost = kLost * fabs(shift);
    pivot = next;
    c += shift;
    lo = lo == -INFINITY ? lo : lo + shift - lost;
    hi = hi == INFINITY ? hi : hi + shift + lost;
  }

  // Root of f(c) = logit((S - P0)/m) - logit((k - P0)/m), P0 = count + rest, by one Halley step; NaN where f is not
  // defined.
  MMER_HD double halley(const SigmoidSums& s, double r, double count, double rest, double m) const {
    const double b = (k - count) - rest, a = b + r;  // k - P0 and S - P0
    if (!(a > 0 && a < m && b > 0 && b < m && s.W > 0)) return NAN;
    const double f = log((a / b) * ((m - b) / (m - a)));
    const double v = a * (m - a) / m;  // m mean (1 - mean)
    const double d1 = s.W / v;
    const double d2 = (s.W - 2 * s.wT) / v - (1 - 2 * a / m) * d1 * d1;
    const double h = f / d1;
    double den = 1 - 0.5 * h * d2 / d1;
    den = den < 0.4 ? 0.4 : (den > 2.5 ? 2.5 : den);
    return -h / den;
  }

  // Solves S + W d + (W - 2 wT) d^2/2 + (W - 6 ww) d^3/6 = k near `guess`.
  MMER_HD static double cubic_step(const SigmoidSums& s, double r, double guess) {
    const double d2 = s.W - 2 * s.wT, d3 = s.W - 6 * s.ww;
    double d = guess;
    for (int i = 0; i < 3; ++i) {
      const double f = r + d * (s.W + d * (0.5 * d2 + d * (d3 / 6)));
      const double slope = s.W + d * (d2 + 0.5 * d * d3);
      if (slope > 0.25 * s.W) d -= f / slope;
    }
    return d;
  }

  // Solves S + W d + ... + S7 d^7/7! = k from Newton's step: a step of Chebyshev, then two of Newton.
  MMER_HD static double septic_step(const SigmoidSums& s, double r, double newton) {
    const double even = s.W - 2 * s.wT, mixed = s.ww - 2 * s.wwT;
    const double a1 = s.W, a2 = even / 2, a3 = (s.W - 6 * s.ww) / 6, a4 = (even - 12 * mixed) / 24;
    const double a5 = (s.W - 30 * s.ww + 120 * s.www) / 120;
    const double a6 = (even - 60 * mixed + 360 * (s.www - 2 * s.wwwT)) / 720;
    const double a7 = (s.W - 126 * s.ww + 1680 * s.www - 5040 * s.wwww) / 5040;
    const double bend = newton * a2 / a1;
    double d = newton * (1 - bend * (1 - 2 * bend));
    for (int i = 0; i < 2; ++i) {
      const double dd = d * d, dddd = dd * dd;
      const double f = ((r + d * a1) + dd * (a2 + d * a3)) + dddd * ((a4 + d * a5) + dd * (a6 + d * a7));
      const double slope =
          ((a1 + d * (2 * a2)) + dd * (3 * a3 + d * (4 * a4))) + dddd * ((5 * a5 + d * (6 * a6)) + dd * (7 * a7));
      if (slope > 0.25 * a1) d -= f / slope;
    }
    return d;
  }
};

}  // namespace MMER_VARIANT
}  // namespace mmer
