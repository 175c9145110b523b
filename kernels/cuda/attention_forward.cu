// Attention forward on the device, by tiles of keys with a running maximum and sum (online softmax, in base 2):
//
//     y = log2(e) (scale q k^T + b),   top' = max(top, max_j (y_j + exponent_j)),   p_j = m_j 2^(y_j - top')
//     sum <- sum 2^(top - top') + sum_j p_j,   o <- o 2^(top - top') + sum_j keep_j p_j v_j
//     at the end o / (sum (1 - p_drop)),   lse = ln(2) top + ln(sum)
//
// A block owns 64 queries of a head and a warp 16 of them, so that a row's maximum and sum stay within a quad of lanes.
#include "attention.h"
#include "attention_keys.cuh"

namespace mmer {
namespace {

template <class T, int kWidth>
inline constexpr int kForwardKeys = sizeof(T) == 2 ? 64 : (kWidth < 128 ? 32 : 16);

template <class T, int kWidth>
struct ForwardShared {
  using Queries = Tile<T, kBlockRows, kWidth>;
  using Keys = KeyPipeline<T, kForwardKeys<T, kWidth>, kWidth>;
  static constexpr int kBytes = Queries::kBytes + Keys::kBytes;
};

// The running state of a lane's two rows, g and g + 8.
template <int kWidth>
struct OnlineSoftmax {
  float top[2] = {negative_infinity(), negative_infinity()};
  float sum[2] = {0.0f, 0.0f};  // the lane's own share
  float out[kWidth / 8][4] = {};

  // Takes in scores; they become p.
  template <int kTiles>
  __device__ __forceinline__ void weigh(float (&y)[kTiles][4], const Place<false>& place, const KeyFactor* factors,
                                        bool factored) {
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float here = top[half];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) here = fmaxf(here, fmaxf(y[n][2 * half], y[n][2 * half + 1]));
      here = quad_max(here);
      shift[half] = here == negative_infinity() ? 0.0f : here;  // no key yet, or NaN alone, which no maximum sees
      const float shrink = exp2_fast(top[half] - shift[half]);
      top[half] = here;
      sum[half] *= shrink;
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        out[n][2 * half] *= shrink;
        out[n][2 * half + 1] *= shrink;
      }
    }
    weigh_queries(y, shift, place, factors, factored);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float part = 0.0f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) part += y[n][2 * half] + y[n][2 * half + 1];
      sum[half] += part;
    }
  }
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kWidth>)
    attention_forward(const AttentionForwardArgs args, const Plan plan) {
  using Shared = ForwardShared<T, kWidth>;
  constexpr int kKeys = kForwardKeys<T, kWidth>;
  const AttentionInputs& in = args.in;
  const unsigned index = blockIdx.x / plan.tiles, place_in_head = blockIdx.x % plan.tiles;
  // Causal: the last queries see the most keys, so they go first.
  const unsigned tile = in.causal ? plan.tiles - 1 - place_in_head : place_in_head;
  const Head at(in, plan, index / plan.heads, index % plan.heads);
  const int begin = static_cast<int>(tile) * kBlockRows;
  if (begin >= at.query_room) return;
  const bool idle = begin >= at.query_count;
  const int row = warp_index() * kWarpRows;

  const typename Shared::Queries queries{dynamic_shared()};
  typename Shared::Keys keys(in, plan, at, idle ? 0 : at.keys_seen(begin + kBlockRows),
                             queries.base + Shared::Queries::kBytes);
  const Dropout dropout(in, plan);
  copy_rows(queries, token_rows<T>(in.q, at.batch, at.head, at.query_first, in.width, plan.q), begin,
            [&](int r) { return begin + r < at.query_count; });
  keys.start();

  OnlineSoftmax<kWidth> state;
  for (int t = 0; t < keys.tiles(); ++t) {
    keys.begin(t);
    const Place<false> place{begin + row, t * kKeys};
    const KeyFactor* factors = keys.factors(t);
    const bool factored = keys.factored(t);
    float y[kKeys / 8][4];
    multiply_rows(y, queries, row, keys.keys(t));
    score_queries(y, at, place, factors, factored);
    state.weigh(y, place, factors, factored);
    if (dropout.on) drop(y, dropout.keep<kKeys / 8>(at, place), 1.0f);
    multiply_accumulated(state.out, y, keys.values(t), static_cast<int>(in.width));
    keys.end(t);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = begin + row + (lane_index() >> 2) + 8 * half;
    const float sum = quad_sum(state.sum[half]);
    if (query >= at.query_room) continue;
    const bool any = query < at.query_count && sum != 0.0f;  // a NaN counts
    store_row(args.out.at<T>(at.batch, at.head, at.query_first + query), static_cast<int>(in.width), state.out, half,
              plan.dropout_rescale / sum, any);
    if (lane_index() % 4 == 0) {
      *args.lse.at(at.batch, at.head, at.query_first + query) =
          any ? state.top[half] * kLn2 + logf(sum) : negative_infinity();
    }
  }
}

struct Forward {
  template <class T, int kWidth>
  static cudaError_t launch(const AttentionForwardArgs& args, Plan plan, cudaStream_t stream) {
    plan.tiles = tiles_of(args.in.queries, kBlockRows);
    return launch_blocks(attention_forward<T, kWidth>, args, plan, args.in.batch * args.in.heads * plan.tiles, kThreads,
                         ForwardShared<T, kWidth>::kBytes, stream);
  }
};

}  // namespace

cudaError_t attention_forward_cuda(const AttentionForwardArgs& args, cudaStream_t stream) {
  return dispatch_attention<Forward>(args.in, args, attention_plan(args.in), stream);
}

}  // namespace mmer
