// Soft top-k, one row at a time:   T_i = sigma((x_i - lambda)/tau),   sum_i T_i = k,   x = sign * s
//
// A row is staged into scratch of the compute type (float, or double for float64), -inf where an entry takes no part:
// sweeps then run over whole vectors whatever the dtype, the mask and the length. common/soft_topk_solver.h decides
// what the sweeps are for.
#include "soft_topk.h"

#include <cmath>
#include <cstdlib>
#include <limits>

#include "../common/soft_topk_solver.h"
#include "simd.h"

namespace mmer {
inline namespace MMER_VARIANT {
namespace {

constexpr int64_t kBlockVectors = 64;  // vectors between two flushes of a lane accumulator into double

// Below this a weight is 0: the exponentials are bounded (exp2_bounded), and -inf lands at their lower end.
template <class C>
constexpr C kNothing = sizeof(C) == 4 ? C(1e-29) : C(1e-297);

template <class C>
constexpr C infinity() {
  return std::numeric_limits<C>::infinity();
}

template <class C>
inline int64_t whole_vectors(int64_t n) {
  return (n + Simd<C>::kLanes - 1) / Simd<C>::kLanes * Simd<C>::kLanes;
}

// Row-sized buffers of one task; whole vectors.
template <class C>
class Scratch {
 public:
  Scratch(int64_t cols, int buffers) : stride_(whole_vectors<C>(cols)) {
    const size_t bytes = static_cast<size_t>(stride_ * buffers) * sizeof(C);
    data_ = static_cast<C*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64));
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  bool ok() const { return data_ != nullptr; }
  C* buffer(int i) { return data_ + i * stride_; }

 private:
  int64_t stride_;
  C* data_;
};

inline int64_t row_length(const SoftTopKRows& in, int64_t row) {
  if (in.lengths == nullptr) return in.cols;
  const int64_t length = in.lengths[row];
  return length < 0 ? 0 : (length > in.cols ? in.cols : length);
}

// x_i = sign s_i; -inf outside the mask and up to the end of the last vector. Returns the number of valid entries.
template <class S, class C>
int64_t stage_scores(const SoftTopKRows& in, int64_t row, int64_t length, C* x) {
  const S* s = static_cast<const S*>(in.scores) + row * in.scores_stride;
  convert_row(s, length, x);
  const int64_t padded = whole_vectors<C>(length);
  for (int64_t i = length; i < padded; ++i) x[i] = -infinity<C>();
  if (!in.largest) {
    for (int64_t i = 0; i < length; ++i) x[i] = -x[i];
  }
  if (in.mask == nullptr) return length;
  const uint8_t* mask = in.mask + row * in.mask_stride;
  int64_t valid = 0;
  for (int64_t i = 0; i < length; ++i) {
    valid += mask[i] != 0;
    x[i] = mask[i] != 0 ? x[i] : -infinity<C>();
  }
  return valid;
}

// Of a row with infinities, NaN or a range that overflows.
template <class C>
RowStats irregular_row_stats(const C* x, int64_t length, int64_t valid) {
  RowStats stats;
  stats.valid = static_cast<double>(valid);
  stats.min = infinity<double>();
  stats.max = -infinity<double>();
  for (int64_t i = 0; i < length; ++i) {
    const double v = x[i];
    if (!(v < infinity<double>())) stats.poisoned = true;
    if (!(v > -infinity<double>())) continue;
    stats.finite += 1;
    const double shift = v - stats.mean;
    stats.mean += shift / stats.finite;
    stats.var += shift * (v - stats.mean);
    stats.min = v < stats.min ? v : stats.min;
    stats.max = v > stats.max ? v : stats.max;
  }
  if (stats.finite > 0) stats.var /= stats.finite;
  return stats;
}

// Mean and variance serve a first guess only: lane sums of the compute type, shifted by the first entry.
template <class C>
RowStats row_stats(const C* x, int64_t length, int64_t valid) {
  using V = Vec<C>;
  constexpr int kLanes = Simd<C>::kLanes;
  const V inf = broadcast<C>(infinity<C>());
  V low = inf, high = -inf, sum{}, square{};
  const C origin = length > 0 ? x[0] : C(0);
  const int64_t whole = length / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const V v = load(x + i), d = v - origin;
    sum += d;
    square += d * d;
    high = v > high ? v : high;
    low = v < low ? v : low;
  }
  double total = sum_lanes(sum), squares = sum_lanes(square);
  double max = max_lanes<C>(high), min = -max_lanes<C>(-low);
  for (int64_t i = whole; i < length; ++i) {
    const double d = x[i] - origin;
    total += d;
    squares += d * d;
    max = x[i] > max ? x[i] : max;
    min = x[i] < min ? x[i] : min;
  }
  RowStats stats;
  stats.valid = stats.finite = static_cast<double>(valid);
  if (!(std::isfinite(total) && min > -infinity<double>() && max < infinity<double>())) {
    return irregular_row_stats(x, length, valid);
  }
  if (length > 0) {
    const double shift = total / length;
    stats.min = min;
    stats.max = max;
    stats.mean = origin + shift;
    stats.var = std::fmax(0.0, squares / length - shift * shift);
  }
  return stats;
}

constexpr double kLog2E = 1.4426950408889634074;

// e^t, t = (x - pivot)/tau + c.
template <class C>
struct Exponential {
  static constexpr double kLargestScale = sizeof(C) == 4 ? 1e38 : 1e300;  // 0 * inf would be NaN at the pivot
  Vec<C> pivot, scale, offset;
  Exponential(double p, double tau, double c)
      : pivot(broadcast<C>(static_cast<C>(p))),
        scale(broadcast<C>(static_cast<C>(std::fmin(kLog2E / tau, kLargestScale)))),
        offset(broadcast<C>(static_cast<C>(kLog2E * c))) {}
  MMER_INLINE Vec<C> log2(const C* x) const { return (load(x) - pivot) * scale + offset; }
  MMER_INLINE Vec<C> operator()(const C* x) const { return exp2_bounded(log2(x)); }
};

// sigma(t) from q = e^t, both sides to full relative precision.
template <class C>
struct Sigmoid {
  Vec<C> taken, left;  // T, 1 - T
  MMER_INLINE explicit Sigmoid(Vec<C> q) : left(reciprocal(q + C(1))) { taken = q * left; }
  MMER_INLINE Vec<C> slope() const { return taken * left; }
};

// Sweeps of one row. A sweep at another c needs no new exponentials: e^(t + s) = e^t e^s. They are taken once for a
// pivot and an offset, and again only where c has gone far from there.
template <class C>
class Sweeper {
 public:
  Sweeper(const C* x, C* q, C* T, int64_t length) : x_(x), q_(q), T_(T), padded_(whole_vectors<C>(length)) {}

  // Writes T and returns the sums that the solver needs.
  SigmoidSums sums(const ThresholdSolver& solver) {
    const C shift = prepare(solver);
    if (solver.selected) return sums<true>(shift);
    SigmoidSums result = sums<false>(shift);  // before selection the whole row counts as one plateau
    result.active = solver.n;
    return result;
  }

  // Writes T; sum T and sum 1 - T over the finite entries, for the Sinkhorn recursion.
  void sinkhorn(const ThresholdSolver& solver, double* sum_T, double* sum_U) {
    const C shift = prepare(solver);
    *sum_T = *sum_U = 0;
    for (int64_t start = 0; start < padded_; start += kBlock) {
      const int64_t end = block_end(start);
      V taken{}, left{};
      for (int64_t i = start; i < end; i += Simd<C>::kLanes) {
        const Sigmoid<C> sigmoid(load(q_ + i) * shift);
        store(T_ + i, sigmoid.taken);
        taken += sigmoid.taken;
        left += load(x_ + i) > -infinity<C>() ? sigmoid.left : V{};
      }
      *sum_T += sum_lanes(taken);
      *sum_U += sum_lanes(left);
    }
  }

 private:
  using V = Vec<C>;
  static constexpr int64_t kBlock = kBlockVectors * Simd<C>::kLanes;
  static constexpr double kReach = 8.0;

  int64_t block_end(int64_t start) const { return start + kBlock < padded_ ? start + kBlock : padded_; }

  // Makes q hold e^t up to a factor, which it returns.
  C prepare(const ThresholdSolver& solver) {
    const double shift = solver.c - base_c_;
    if (ready_ && solver.pivot == base_pivot_ && std::fabs(shift) <= kReach) return static_cast<C>(std::exp(shift));
    ready_ = true;
    base_pivot_ = solver.pivot;
    base_c_ = solver.c;
    const Exponential<C> exponential(solver.pivot, solver.tau, solver.c);
    for (int64_t i = 0; i < padded_; i += Simd<C>::kLanes) store(q_ + i, exponential(x_ + i));
    return C(1);
  }

  template <bool kPlateau>
  SigmoidSums sums(C shift) {
    SigmoidSums sums;
    const V zero{}, one = broadcast<C>(1);
    const V edge = broadcast<C>(static_cast<C>(2980.9579870417283));  // e^kActive
    for (int64_t start = 0; start < padded_; start += kBlock) {
      const int64_t end = block_end(start);
      V upper = zero, d = zero, W = zero, wT = zero, ww = zero, active = zero, outer_upper = zero, outer_d = zero;
      for (int64_t i = start; i < end; i += Simd<C>::kLanes) {
        const V q = load(q_ + i) * shift;
        const Sigmoid<C> sigmoid(q);
        const V T = sigmoid.taken, w = sigmoid.slope();
        const auto above = q >= one;
        const V to_nearest = above ? -sigmoid.left : T;
        store(T_ + i, T);
        upper += above ? one : zero;
        d += to_nearest;
        W += w;
        wT += w * T;
        ww += w * w;
        if constexpr (kPlateau) {
          const auto near = (q <= edge) & (q * edge >= one);
          active += near ? one : zero;
          outer_upper += q > edge ? one : zero;
          outer_d += near ? zero : to_nearest;
        }
      }
      sums.upper += sum_lanes(upper);
      sums.d += sum_lanes(d);
      sums.W += sum_lanes(W);
      sums.wT += sum_lanes(wT);
      sums.ww += sum_lanes(ww);
      if constexpr (kPlateau) {
        sums.active += sum_lanes(active);
        sums.outer_upper += sum_lanes(outer_upper);
        sums.outer_d += sum_lanes(outer_d);
      }
    }
    return sums;
  }

  const C* x_;
  C *q_, *T_;
  int64_t padded_;
  bool ready_ = false;
  double base_pivot_ = 0, base_c_ = 0;
};

// Order-preserving key of a score in float32.
inline uint32_t key_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline double value_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7FFFFFFFu : ~key;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The score of a place (1 is the largest) by radix: three counting sweeps over 11, 11 and 10 bits of the key. float64
// scores are selected by their float32 rounding, which is monotone: a start for the sigmoid sweeps, not an answer.
template <class C>
Selection select(const C* x, int64_t length, double place) {
  constexpr int kShift[3] = {21, 10, 0};
  constexpr uint32_t kDigit[3] = {2047, 2047, 1023};
  uint32_t histogram[2048];
  uint32_t prefix = 0, below = 0;
  Selection selection;
  int64_t rank = static_cast<int64_t>(place);
  for (int pass = 0; pass < 3; ++pass) {
    std::memset(histogram, 0, sizeof histogram);
    const int shift = kShift[pass], outer_shift = pass == 0 ? 31 : kShift[pass - 1];
    for (int64_t i = 0; i < length; ++i) {
      const uint32_t key = key_of(static_cast<float>(x[i]));
      const bool inside = pass == 0 || (key >> outer_shift) == (prefix >> outer_shift);
      if (inside) {
        ++histogram[(key >> shift) & kDigit[pass]];
      } else if (pass == 2 && key < prefix && key > below) {
        below = key;
      }
    }
    uint32_t digit = kDigit[pass];
    while (digit > 0 && rank > histogram[digit]) {
      rank -= histogram[digit];
      selection.above += histogram[digit];
      --digit;
    }
    prefix |= digit << shift;
    if (pass < 2) continue;
    selection.value = value_of(prefix);
    selection.equal = histogram[digit];
    for (uint32_t d = digit; d-- > 0;) {
      if (histogram[d] > 0) {
        below = (prefix & ~kDigit[2]) | d;
        break;
      }
    }
    selection.below = below > key_of(-infinity<float>()) ? value_of(below) : -infinity<double>();
  }
  return selection;
}

// The weights from the last sweep's T, moved by d = solver.last_step through the cubic
//     sigma(t + d) = T + w d + w (1 - 2T) d^2/2 + w (1 - 6w) d^3/6,   w = T (1 - T),
// times `factor` (Sinkhorn's). Returns sum T before the factor.
template <class S, class C>
double write_weights(const C* T_in, int64_t length, double step, C factor, S* out) {
  using V = Vec<C>;
  constexpr int kLanes = Simd<C>::kLanes;
  constexpr int64_t kBlock = kBlockVectors * kLanes;
  const C first = static_cast<C>(step + step * step / 2 + step * step * step / 6);
  const C second = static_cast<C>(step * step), third = static_cast<C>(step * step * step);
  const int64_t padded = whole_vectors<C>(length);
  double total = 0;
  for (int64_t start = 0; start < padded; start += kBlock) {
    const int64_t end = start + kBlock < padded ? start + kBlock : padded;
    V sum{};
    for (int64_t i = start; i < end; i += kLanes) {
      const V T = load(T_in + i), w = T - T * T;
      V moved = T + w * (first - T * second - w * third);
      moved = moved > kNothing<C> ? moved : V{};
      sum += moved;
      const V scaled = moved * factor;
      if (i + kLanes <= length) {
        store_as(scaled, out + i);
      } else {
        for (int64_t j = 0; i + j < length; ++j) from_compute(scaled[j], out + i + j);
      }
    }
    total += sum_lanes(sum);
  }
  return total;
}

// Rows without a root: every finite entry gets solver.fill (0, 1 or NaN; NaN rows whole).
template <class S, class C>
void write_saturated(const SoftTopKRows& in, int64_t row, int64_t length, const C* x, double fill, S* out) {
  const bool nan = fill != fill;
  for (int64_t i = 0; i < length; ++i) {
    const bool valid = in.mask == nullptr || in.mask[row * in.mask_stride + i] != 0;
    const bool takes = nan ? valid : x[i] > -infinity<C>();
    from_compute(static_cast<C>(takes ? fill : 0.0), out + i);
  }
}

template <class S>
bool forward_rows(const SoftTopKForwardArgs& args, int64_t begin, int64_t end) {
  using C = typename ComputeOf<S>::type;
  using Action = ThresholdSolver::Action;
  constexpr bool kFloat = sizeof(C) == 4;
  const SoftTopKRows& in = args.in;
  const double sign = in.largest ? 1.0 : -1.0;
  Scratch<C> scratch(in.cols, 3);
  if (!scratch.ok()) return false;
  C *x = scratch.buffer(0), *q = scratch.buffer(1), *T = scratch.buffer(2);
  for (int64_t row = begin; row < end; ++row) {
    S* out = static_cast<S*>(args.weights) + row * in.cols;
    const int64_t length = row_length(in, row);
    const int64_t valid = stage_scores<S, C>(in, row, length, x);
    for (int64_t i = length; i < in.cols; ++i) from_compute(C(0), out + i);

    const double k = args.k != nullptr ? args.k[row] : args.k_value;
    const double tau = in.tau != nullptr ? in.tau[row] : in.tau_value;
    const RowStats stats = row_stats(x, length, valid);
    Sweeper<C> sweeper(x, q, T, length);
    ThresholdSolver solver;
    double factor = 1.0;
    if (args.sinkhorn_iterations > 0) {
      solver.start_sinkhorn(stats, k, tau, sign);
      for (int64_t t = 0; t < args.sinkhorn_iterations && !solver.saturated; ++t) {
        double sum_T, sum_U;
        sweeper.sinkhorn(solver, &sum_T, &sum_U);
        factor = k / sum_T;
        if (t + 1 < args.sinkhorn_iterations) solver.sinkhorn_step(sum_T, sum_U, stats);
      }
    } else {
      Action action = solver.start(stats, k, tau, kFloat);
      while (action != Action::kOutput) {
        action = action == Action::kSelect
                     ? solver.after_selection(select(x, length, ThresholdSolver::selection_rank(k)), kFloat)
                     : solver.after_sweep(sweeper.sums(solver), kFloat);
      }
    }

    double residual;
    if (solver.saturated) {
      write_saturated<S, C>(in, row, length, x, solver.fill, out);
      residual = solver.fill * stats.finite - k;
    } else {
      residual = write_weights(T, length, solver.last_step, static_cast<C>(factor), out) - k;
    }
    args.threshold[row] = sign * solver.threshold();
    args.certificate[2 * row] = residual;
    args.certificate[2 * row + 1] = in.cols > 0 ? solver.sweeps : 0;
  }
  return true;
}

// dL/dT of the valid entries, 0 elsewhere.
template <class S, class C>
void stage_gradient(const SoftTopKBackwardArgs& args, int64_t row, int64_t length, C* g) {
  const S* grad = static_cast<const S*>(args.grad_weights) + row * args.grad_weights_stride;
  convert_row(grad, length, g);
  for (int64_t i = length; i < whole_vectors<C>(length); ++i) g[i] = 0;
  if (args.in.mask == nullptr) return;
  const uint8_t* mask = args.in.mask + row * args.in.mask_stride;
  for (int64_t i = 0; i < length; ++i) g[i] = mask[i] != 0 ? g[i] : C(0);
}

struct GradientSums {
  double w = 0, wg = 0, wt = 0, wgt = 0;
};

// w_i = T_i (1 - T_i) into `w`, and the sums that the gradient needs.
template <class C>
GradientSums gradient_sweep(const C* x, const C* g, int64_t padded, const Exponential<C>& exponential, C* w_out) {
  using V = Vec<C>;
  constexpr double kLog2 = 0.69314718055994530942;
  const V zero{};
  GradientSums sums;
  constexpr int64_t kBlock = kBlockVectors * Simd<C>::kLanes;
  for (int64_t start = 0; start < padded; start += kBlock) {
    const int64_t end = start + kBlock < padded ? start + kBlock : padded;
    V sw = zero, swg = zero, swt = zero, swgt = zero;
    for (int64_t i = start; i < end; i += Simd<C>::kLanes) {
      const auto finite = load(x + i) > -infinity<C>();
      const V t = finite ? exponential.log2(x + i) : zero;  // in units of log 2
      const V slope = Sigmoid<C>(exp2_bounded(t)).slope();
      const V w = (finite & (slope > kNothing<C>)) ? slope : zero;
      const V wg = w * (finite ? load(g + i) : zero);
      store(w_out + i, w);
      sw += w;
      swg += wg;
      swt += w * t;
      swgt += wg * t;
    }
    sums.w += sum_lanes(sw);
    sums.wg += sum_lanes(swg);
    sums.wt += kLog2 * sum_lanes(swt);
    sums.wgt += kLog2 * sum_lanes(swgt);
  }
  return sums;
}

template <class S>
bool backward_rows(const SoftTopKBackwardArgs& args, int64_t begin, int64_t end) {
  using C = typename ComputeOf<S>::type;
  const SoftTopKRows& in = args.in;
  const double sign = in.largest ? 1.0 : -1.0;
  Scratch<C> scratch(in.cols, 3);
  if (!scratch.ok()) return false;
  C *x = scratch.buffer(0), *g = scratch.buffer(1), *w = scratch.buffer(2);
  for (int64_t row = begin; row < end; ++row) {
    S* out = static_cast<S*>(args.grad_scores) + row * in.cols;
    const double lambda = sign * args.threshold[row];
    const double tau = in.tau != nullptr ? in.tau[row] : in.tau_value;
    const int64_t length = std::isfinite(lambda) ? row_length(in, row) : 0;
    for (int64_t i = length; i < in.cols; ++i) from_compute(C(0), out + i);
    args.grad_k[row] = args.grad_tau[row] = 0;
    if (length == 0) continue;

    stage_scores<S, C>(in, row, length, x);
    stage_gradient<S, C>(args, row, length, g);
    const double pivot = static_cast<C>(lambda);
    const Exponential<C> exponential(pivot, tau, (pivot - lambda) / tau);
    const GradientSums sums = gradient_sweep(x, g, whole_vectors<C>(length), exponential, w);
    double pulled = sums.wg;
    if (args.grad_threshold != nullptr) pulled -= sign * tau * args.grad_threshold[row];
    const double mean = sums.w > std::numeric_limits<double>::min() ? pulled / sums.w : 0.0;

    const C factor = static_cast<C>(sign / tau), mean_c = static_cast<C>(mean);
    for (int64_t i = 0; i < length; ++i) {
      const C flow = w[i] > C(0) ? factor * w[i] * (g[i] - mean_c) : C(0);
      from_compute(flow, out + i);
    }
    args.grad_k[row] = mean;
    args.grad_tau[row] = -(sums.wgt - mean * sums.wt) / tau;
  }
  return true;
}

}  // namespace

template <class Args, class Rows32, class Rows64, class RowsB, class RowsH>
MMER_INLINE bool by_dtype(const Args& args, int64_t begin, int64_t end, Rows32 f32, Rows64 f64, RowsB bf16, RowsH f16) {
  switch (args.in.dtype) {
    case DType::kFloat32: return f32(args, begin, end);
    case DType::kFloat64: return f64(args, begin, end);
    case DType::kBFloat16: return bf16(args, begin, end);
    default: return f16(args, begin, end);
  }
}

bool soft_topk_forward_rows(const SoftTopKForwardArgs& args, int64_t begin, int64_t end) {
  return by_dtype(args, begin, end, forward_rows<float>, forward_rows<double>, forward_rows<BFloat16>,
                  forward_rows<Float16>);
}

bool soft_topk_backward_rows(const SoftTopKBackwardArgs& args, int64_t begin, int64_t end) {
  return by_dtype(args, begin, end, backward_rows<float>, backward_rows<double>, backward_rows<BFloat16>,
                  backward_rows<Float16>);
}

}  // namespace MMER_VARIANT
}  // namespace mmer
