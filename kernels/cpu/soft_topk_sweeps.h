// Sweeps over a staged row of soft top-k:   q_i = e^t_i,   T_i = q_i/(1 + q_i),   t_i = (x_i - p)/tau + c
#pragma once

#include "exp2.h"
#include "soft_topk_rows.h"

namespace mmer {
inline namespace MMER_VARIANT {

// Entries between two flushes of an accumulator into double.
template <class C>
constexpr int64_t kBlock = 16 * Vec<C>::kLanes;

// Below this a weight is 0: the exponentials are bounded (exp2_bounded), and -inf lands at their lower end.
template <class C>
constexpr C kNothing = sizeof(C) == 4 ? C(1e-29) : C(1e-297);

// Slopes up to this add nothing to the sums of their powers. The powers would be subnormal numbers, which are slow;
// with AVX-512 the products are masked, and so are not computed.
template <class C>
constexpr C kFaint = sizeof(C) == 4 ? C(1e-9) : C(1e-70);

inline int64_t block_end(int64_t start, int64_t block, int64_t end) {
  return start + block < end ? start + block : end;
}

// e^t, t = (x - pivot)/tau + c.
template <class C>
struct Exponential {
  static constexpr double kLog2E = 1.4426950408889634074;
  static constexpr double kLargestScale = sizeof(C) == 4 ? 1e38 : 1e300;  // 0 * inf would be NaN at the pivot
  C pivot, scale, offset;
  Exponential(double p, double tau, double c)
      : pivot(static_cast<C>(p)),
        scale(static_cast<C>(kLog2E / tau < kLargestScale ? kLog2E / tau : kLargestScale)),
        offset(static_cast<C>(kLog2E * c)) {}
  MMER_INLINE Vec<C> log2(Vec<C> x) const { return (x - pivot) * scale + offset; }
  MMER_INLINE Vec<C> operator()(Vec<C> x) const { return exp2_bounded(log2(x)); }
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
  Sweeper() = default;
  // x: the staged row; q, T: whole vectors of scratch.
  Sweeper(const C* x, int64_t length, C* q, C* T) : x_(x), q_(q), T_(T), padded_(whole_vectors<C>(length)) {}

  const C* weights() const { return T_; }

  // Writes T and returns the sums that the solver needs.
  SigmoidSums sums(const ThresholdSolver& solver) {
    const bool fresh = !reaches(solver), high = kHighPays && fresh && solver.near();
    if (fresh) rebase(solver);
    ready_ = !high;  // a high sweep keeps no exponentials: few rows need another sweep after it
    const Exponential<C> exponential(solver.pivot, solver.tau, solver.c);
    const C shift = static_cast<C>(fresh ? 1.0 : std::exp(solver.c - base_c_));
    if (solver.selected) {
      return fresh ? sums<kPlateau | kFresh>(exponential, shift) : sums<kPlateau>(exponential, shift);
    }
    SigmoidSums result = high    ? sums<kFresh | kHigh>(exponential, shift)
                         : fresh ? sums<kFresh>(exponential, shift)
                                 : sums<0>(exponential, shift);
    result.active = solver.n;  // before selection the whole row counts as one plateau
    return result;
  }

  // Writes T; sum T and sum 1 - T over the finite entries, for the Sinkhorn recursion.
  void sinkhorn(const ThresholdSolver& solver, double* sum_T, double* sum_U) {
    const Exponential<C> exponential(solver.pivot, solver.tau, solver.c);
    *sum_T = *sum_U = 0;
    for (int64_t start = 0; start < padded_; start += kBlock<C>) {
      const int64_t end = block_end(start, kBlock<C>, padded_);
      Accumulator<C> taken, left;
      for (int64_t i = start; i < end; i += Vec<C>::kLanes) {
        const V x = load(x_ + i);
        const Sigmoid<C> sigmoid(exponential(x));
        store(T_ + i, sigmoid.taken);
        taken.add(sigmoid.taken);
        left.add(where(x > -infinity<C>(), sigmoid.left));
      }
      *sum_T += taken.total();
      *sum_U += left.total();
    }
  }

 private:
  using V = Vec<C>;
  static constexpr double kReach = 8.0;
  static constexpr bool kHighPays = kVectorBytes == 64;      // fewer than 32 registers do not hold so many sums
  static constexpr double kActiveEdge = 2980.9579870417283;  // e^kActive
  static_assert(ThresholdSolver::kActive == 8.0, "kActiveEdge is its exponential");

  bool reaches(const ThresholdSolver& solver) const {
    return ready_ && solver.pivot == base_pivot_ && std::fabs(solver.c - base_c_) <= kReach;
  }

  void rebase(const ThresholdSolver& solver) {
    base_pivot_ = solver.pivot;
    base_c_ = solver.c;
  }

  // What a sweep does beside T and the sums up to ww: takes exponentials, sums over the plateau, sums up to wwww.
  static constexpr int kFresh = 1, kPlateau = 2, kHigh = 4;

  template <int kKind>
  SigmoidSums sums(const Exponential<C>& exponential, C shift) const {
    SigmoidSums sums;
    const C* const x = x_;
    C *const q_row = q_, *const T_row = T_;
    constexpr C one = 1, edge = static_cast<C>(kActiveEdge);
    sums.high = (kKind & kHigh) != 0;
    for (int64_t start = 0; start < padded_; start += kBlock<C>) {
      const int64_t end = block_end(start, kBlock<C>, padded_);
      Accumulator<C> upper, d, W, wT, ww, wwT, www, wwwT, wwww, active, outer_upper, outer_d;
      for (int64_t i = start; i < end; i += Vec<C>::kLanes) {
        V q;
        if constexpr ((kKind & kFresh) != 0) {
          q = exponential(load(x + i));
          if constexpr ((kKind & kHigh) == 0) store(q_row + i, q);
        } else {
          q = load(q_row + i) * shift;
        }
        const Sigmoid<C> sigmoid(q);
        const V T = sigmoid.taken, w = sigmoid.slope();
        const Mask<C> above = q >= one;
        const V to_nearest = select(above, -sigmoid.left, T);
        store(T_row + i, T);
        upper.count(above);
        d.add(to_nearest);
        W.add(w);
        wT.add_product(w, T);
        if constexpr ((kKind & kHigh) == 0) {
          ww.add_product(w, w);
        } else {
          const V w2 = where(w > kFaint<C>, w * w), w3 = w2 * w;
          ww.add(w2);
          wwT.add_product(w2, T);
          www.add(w3);
          wwwT.add_product(w3, T);
          wwww.add_product(w2, w2);
        }
        if constexpr ((kKind & kPlateau) != 0) {
          const Mask<C> near = (q <= edge) & (q * edge >= one);
          active.count(near);
          outer_upper.count(q > edge);
          outer_d.add(select(near, V{}, to_nearest));
        }
      }
      sums.upper += upper.total();
      sums.d += d.total();
      sums.W += W.total();
      sums.wT += wT.total();
      sums.ww += ww.total();
      if constexpr ((kKind & kHigh) != 0) {
        sums.wwT += wwT.total();
        sums.www += www.total();
        sums.wwwT += wwwT.total();
        sums.wwww += wwww.total();
      }
      if constexpr ((kKind & kPlateau) != 0) {
        sums.active += active.total();
        sums.outer_upper += outer_upper.total();
        sums.outer_d += outer_d.total();
      }
    }
    return sums;
  }

  const C* x_ = nullptr;
  C *q_ = nullptr, *T_ = nullptr;
  int64_t padded_ = 0;
  bool ready_ = false;
  double base_pivot_ = 0, base_c_ = 0;
};

// The weights from the last sweep's T, moved by d = solver.last_step:   w = T (1 - T),
//     sigma(t + d) = T + w (e^d - 1) / (1 + T (e^d - 1))
template <class C>
struct Moved {
  C growth;
  explicit Moved(double d) : growth(static_cast<C>(std::expm1(d))) {}
  MMER_INLINE Vec<C> operator()(Vec<C> T) const {
    const Vec<C> w = T - T * T;
    return T + w * growth * reciprocal(T * growth + C(1));
  }
};

// For small d, cheaper:
//     sigma(t + d) = T + w d + w (1 - 2T) d^2/2 + w (1 - 6w) d^3/6
template <class C>
struct MovedLittle {
  C first, second, third;
  explicit MovedLittle(double d)
      : first(static_cast<C>(d + d * d / 2 + d * d * d / 6)),
        second(static_cast<C>(d * d)),
        third(static_cast<C>(d * d * d)) {}
  MMER_INLINE Vec<C> operator()(Vec<C> T) const {
    const Vec<C> w = T - T * T;
    return T + w * (first - T * second - w * third);
  }
};

// Writes the moved weights times `factor` (Sinkhorn's). Returns their sum before the factor.
template <class S, class C, class Move>
double write_weights(const C* T_in, int64_t length, Move move, C factor, S* out) {
  using V = Vec<C>;
  const int64_t padded = whole_vectors<C>(length);
  double total = 0;
  for (int64_t start = 0; start < padded; start += kBlock<C>) {
    const int64_t end = block_end(start, kBlock<C>, padded);
    Accumulator<C> sum;
    store_row<C>(out, start, end, length, [&](int64_t i) MMER_INLINE_LAMBDA {
      const V moved = move(load(T_in + i));
      const V kept = where(moved > kNothing<C>, moved);
      sum.add(kept);
      return kept * factor;
    });
    total += sum.total();
  }
  return total;
}

}  // namespace MMER_VARIANT
}  // namespace mmer
