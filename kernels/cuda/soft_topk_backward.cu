// Backward soft top-k on the device, by the implicit function theorem (the iterations are not needed):
//
//     t_i = sign (s_i - lambda) / tau     w_i = T_i (1 - T_i)     W = sum w
//     m = (sum w g - sign tau dL/dlambda) / W
//     dL/ds_i = sign w_i (g_i - m) / tau   dL/dk = m   dL/dtau = -(sum w g t - m sum w t) / tau
//
// One sweep for the sums, one for the output. Where W underflows (a hard selection) the gradient is 0.
#include <cfloat>

#include "soft_topk.h"
#include "soft_topk_lanes.cuh"
#include "soft_topk_launch.cuh"
#include "soft_topk_long_row.cuh"

namespace mmer {
namespace {

struct GradientSums {
  double w = 0, wg = 0, wt = 0, wgt = 0;
};

// w and t of an entry; both 0 where it takes no part. Far off w is 0, and t may have overflowed: 0 times it is to be 0.
template <typename Compute>
struct Slope {
  Compute w, t;

  __device__ __forceinline__ Slope(const Argument<Compute>& argument, Compute x) {
    const bool finite = x > -infinity<Compute>();
    constexpr Compute far = 1e30f;
    t = finite ? fmin(fmax(argument(x), -far), far) : Compute(0);
    w = finite ? Sigmoid<Compute>(t).w : Compute(0);
  }
};

// One thread's share of GradientSums.
template <typename Compute>
struct ThreadGradientSums {
  WideSum<Compute> w, wg, wt, wgt;

  __device__ __forceinline__ void add(const Argument<Compute>& argument, const Compute* x, const Compute* g) {
    constexpr int width = kVector<Compute>;
    Compute a[width], b[width], c[width], d[width];
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const Slope<Compute> slope(argument, x[j]);
      a[j] = slope.w;
      b[j] = slope.w > 0 ? slope.w * g[j] : Compute(0);
      c[j] = slope.w * slope.t;
      d[j] = b[j] * slope.t;
    }
    w.add(vector_sum<Compute>(a));
    wg.add(vector_sum<Compute>(b));
    wt.add(vector_sum<Compute>(c));
    wgt.add(vector_sum<Compute>(d));
  }
};

// A row's threshold: lambda = pivot - c tau with the pivot in the compute type, so that x - pivot is exact near it.
template <typename Compute>
struct Threshold {
  double lambda;  // in the order of selection: sign already applied
  double tau, sign, upstream;
  Argument<Compute> argument;

  __device__ __forceinline__ Threshold(const SoftTopKBackwardArgs& args, const Row<Compute>& row, int64_t r) {
    const bool live = r < args.in.rows;
    sign = row.sign;
    tau = row.tau;
    lambda = live ? sign * args.threshold[r] : INFINITY;
    upstream = live && args.grad_threshold != nullptr ? args.grad_threshold[r] : 0.0;
    const double pivot = round_to_compute(lambda, sizeof(Compute) == 4);
    argument = {static_cast<Compute>(pivot), inverse_temperature<Compute>(tau),
                static_cast<Compute>((pivot - lambda) / tau)};
  }

  __device__ __forceinline__ bool finite() const { return fabs(lambda) < INFINITY; }

  __device__ __forceinline__ double mean(const GradientSums& sums) const {
    if (!(sums.w > DBL_MIN && sums.w < INFINITY)) return 0.0;
    return (sums.wg - sign * tau * upstream) / sums.w;
  }

  // dL/ds of an entry.
  __device__ __forceinline__ Compute flow(Compute x, Compute g, Compute mean) const {
    const Compute w = Slope<Compute>(argument, x).w;
    return w > 0 ? static_cast<Compute>(sign) * argument.inverse_tau * w * (g - mean) : Compute(0);
  }

  __device__ __forceinline__ void write_scalars(const SoftTopKBackwardArgs& args, int64_t r, const GradientSums& sums,
                                                double mean) const {
    args.grad_k[r] = finite() ? mean : 0.0;
    args.grad_tau[r] = finite() ? -(sums.wgt - mean * sums.wt) / tau : 0.0;
  }
};

template <typename Compute, int kLanes, int kItems>
__global__ void __launch_bounds__(kShortThreads, short_blocks(sizeof(Compute) * kItems))
    soft_topk_backward_short(const SoftTopKBackwardArgs args) {
  using Entries = LaneRow<Compute, kLanes, kItems>;
  using Group = Lanes<kLanes>;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool live = row < args.in.rows;
  const int64_t safe_row = live ? row : 0;
  const Row<Compute> input(args.in, row);
  const MatrixRow<Compute> upstream(args.grad_weights, safe_row, args.grad_weights_stride, args.in.dtype);
  const MatrixRow<Compute> output(args.grad_scores, safe_row, args.in.cols, args.in.dtype);
  const bool vectorised = input.scores.aligned() && upstream.aligned() && output.aligned();
  const Threshold<Compute> threshold(args, input, row);

  Entries entries;
  Compute g[kItems];
  entries.load(input, lane, vectorised);
  load_lane_values<kLanes, Entries::kPacks>(upstream, input.length, lane, vectorised, g);
  ThreadGradientSums<Compute> part;
#pragma unroll
  for (int i = 0; i < kItems; i += Entries::kWidth) part.add(threshold.argument, &entries.x[i], &g[i]);
  GradientSums sums;
  sums.w = Group::sum(part.w.total());
  sums.wg = Group::sum(part.wg.total());
  sums.wt = Group::sum(part.wt.total());
  sums.wgt = Group::sum(part.wgt.total());

  const double mean = threshold.mean(sums);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const Compute flow = threshold.flow(entries.x[i], g[i], static_cast<Compute>(mean));
    g[i] = threshold.finite() ? flow : Compute(0);
  }
  if (!live) return;
  store_lane_values<kLanes, Entries::kPacks>(output, input.cols, lane, vectorised, g);
  if (lane == 0) threshold.write_scalars(args, row, sums, mean);
}

struct BackwardShared {
  TeamScratch scratch;
  double mean;
};

template <typename Compute>
__global__ void __launch_bounds__(kLongThreads, kLongBlocks)
    soft_topk_backward_long(const SoftTopKBackwardArgs args, const TeamShape shape) {
  static_assert(sizeof(BackwardShared) <= kFixedShared, "the launch reserves too little");
  BackwardShared& shared = *reinterpret_cast<BackwardShared*>(block_shared());
  const int64_t row = blockIdx.x / static_cast<unsigned>(shape.ranks);
  Team team(shared.scratch, shape.ranks);
  const Row<Compute> input(args.in, row);
  const MatrixRow<Compute> upstream(args.grad_weights, row, args.grad_weights_stride, args.in.dtype);
  const MatrixRow<Compute> output(args.grad_scores, row, args.in.cols, args.in.dtype);
  const LongRow<Compute> entries(input, shape, team.rank(), static_cast<Compute*>(nullptr));
  const Threshold<Compute> threshold(args, input, row);

  ThreadGradientSums<Compute> part;
  entries.for_each_pack_with(upstream,
                             [&](int, const Compute* x, const Compute* g) { part.add(threshold.argument, x, g); });
  double values[] = {part.w.total(), part.wg.total(), part.wt.total(), part.wgt.total()};
  team.reduce<4>(values);
  if (threadIdx.x == 0) {
    const GradientSums sums{values[0], values[1], values[2], values[3]};
    shared.mean = threshold.mean(sums);
    if (team.rank() == 0) threshold.write_scalars(args, row, sums, shared.mean);
  }
  __syncthreads();
  const Compute mean = static_cast<Compute>(shared.mean);

  const bool vectorised = output.aligned();
  entries.for_each_pack_with(upstream, [&](int column, const Compute* x, const Compute* g) {
    Compute flow[kVector<Compute>];
#pragma unroll
    for (int j = 0; j < kVector<Compute>; ++j) {
      flow[j] = threshold.finite() ? threshold.flow(x[j], g[j], mean) : Compute(0);
    }
    output.typed(
        [&](auto* data) { store_pack(data, input.cols, vectorised, [&](int j) { return column + j; }, flow); });
  });
  team.leave();
}

struct Backward {
  template <typename Compute>
  static cudaError_t launch(const SoftTopKBackwardArgs& args, cudaStream_t stream) {
    if (args.in.cols <= 128) return launch_short(soft_topk_backward_short<Compute, 8, 16>, args, 8, stream);
    if (args.in.cols <= 512) return launch_short(soft_topk_backward_short<Compute, 32, 16>, args, 32, stream);
    if (args.in.cols <= 1024) return launch_short(soft_topk_backward_short<Compute, 32, 32>, args, 32, stream);
    return launch_long(soft_topk_backward_long<Compute>, args, args.in, sizeof(Compute), stream, /*stages=*/false);
  }
};

}  // namespace

cudaError_t soft_topk_backward_cuda(const SoftTopKBackwardArgs& args, cudaStream_t stream) {
  return dispatch_rows<Backward>(args, args.in, stream);
}

}  // namespace mmer
