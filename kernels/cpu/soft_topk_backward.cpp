// Soft top-k backward, with T = sigma((x - lambda)/tau) computed anew from lambda and w = T (1 - T):
//
//     gbar = (sum w g - sign tau g_lambda)/sum w
//     dL/ds_i = sign w_i (g_i - gbar)/tau,   dL/dk = gbar,   dL/dtau = -(1/tau) sum w_i (g_i - gbar) t_i
#include "soft_topk_sweeps.h"

namespace mmer {
inline namespace MMER_VARIANT {
namespace {

struct GradientSums {
  double w = 0, wg = 0, wt = 0, wgt = 0;
};

// w_i into `w_out`, and the sums.
template <class C>
GradientSums gradient_sweep(const C* x, const C* g, int64_t padded, const Exponential<C>& exponential, C* w_out) {
  using V = Vec<C>;
  constexpr double kLog2 = 0.69314718055994530942;
  GradientSums sums;
  for (int64_t start = 0; start < padded; start += kBlock<C>) {
    const int64_t end = block_end(start, kBlock<C>, padded);
    Accumulator<C> sw, swg, swt, swgt;
    for (int64_t i = start; i < end; i += Vec<C>::kLanes) {
      const V xi = load(x + i);
      const Mask<C> finite = xi > -infinity<C>();
      const V log2 = where(finite, exponential.log2(xi));
      const V slope = Sigmoid<C>(exp2_bounded(log2)).slope();
      const Mask<C> sloped = finite & (slope > kNothing<C>);
      const V w = where(sloped, slope), t = where(sloped, log2);  // a large t has no slope and may have overflowed
      const V wg = w * where(finite, load(g + i));
      store(w_out + i, w);
      sw.add(w);
      swg.add(wg);
      swt.add_product(w, t);
      swgt.add_product(wg, t);
    }
    sums.w += sw.total();
    sums.wg += swg.total();
    sums.wt += kLog2 * swt.total();
    sums.wgt += kLog2 * swgt.total();
  }
  return sums;
}

// dL/ds_i; w_i = 0 where g_i may hold anything.
template <class S, class C>
void write_gradient(const C* w_in, const C* g_in, int64_t length, C factor, C mean, S* out) {
  store_row<C>(out, 0, whole_vectors<C>(length), length, [&](int64_t i) MMER_INLINE_LAMBDA {
    const Vec<C> w = load(w_in + i);
    return where(w > C(0), w * factor * (load(g_in + i) - mean));
  });
}

template <class S>
void backward_row(const SoftTopKBackwardArgs& args, int64_t row, const Scratch<typename ComputeOf<S>::type>& scratch) {
  using C = typename ComputeOf<S>::type;
  const SoftTopKRows& in = args.in;
  const double sign = in.largest ? 1.0 : -1.0;
  const double lambda = sign * args.threshold[row];
  const double tau = usable_tau(in.tau != nullptr ? in.tau[row] : in.tau_value, sizeof(C) == 4);
  const int64_t length = std::isfinite(lambda) ? row_length(in, row) : 0;
  S* out = static_cast<S*>(args.grad_scores) + row * in.cols;
  store_zeros(out, length, in.cols);
  args.grad_k[row] = args.grad_tau[row] = 0;
  if (length == 0) return;

  const C* x = stage_scores<S, C>(in, row, length, scratch.buffer(0)).x;
  const C* g = stage_gradient<S, C>(args, row, length, scratch.buffer(1));
  C* w = scratch.buffer(2);
  const double pivot = round_to_compute(lambda, sizeof(C) == 4);
  const Exponential<C> exponential(pivot, tau, (pivot - lambda) / tau);
  const GradientSums sums = gradient_sweep(x, g, whole_vectors<C>(length), exponential, w);
  double pulled = sums.wg;
  if (args.grad_threshold != nullptr) pulled -= sign * tau * args.grad_threshold[row];
  const double mean = sums.w > std::numeric_limits<double>::min() ? pulled / sums.w : 0.0;
  write_gradient<S, C>(w, g, length, static_cast<C>(sign / tau), static_cast<C>(mean), out);
  args.grad_k[row] = mean;
  args.grad_tau[row] = -(sums.wgt - mean * sums.wt) / tau;
}

template <class S>
bool backward_rows(const SoftTopKBackwardArgs& args, int64_t begin, int64_t end) {
  const Scratch<typename ComputeOf<S>::type> scratch(args.in.cols, 3);
  if (!scratch.ok()) return false;
  for (int64_t row = begin; row < end; ++row) backward_row<S>(args, row, scratch);
  return true;
}

}  // namespace

bool soft_topk_backward_rows(const SoftTopKBackwardArgs& args, int64_t begin, int64_t end) {
  return by_storage(args.in.dtype, [&](auto storage) { return backward_rows<decltype(storage)>(args, begin, end); });
}

}  // namespace MMER_VARIANT
}  // namespace mmer
