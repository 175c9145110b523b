// The gradient of the queries:   dq_i = scale sum_j ds_ij k_j
//
// A block owns 64 queries of a head and passes through its keys, as the forward kernel does.
#include "attention_backward.cuh"

namespace mmer {
namespace {

template <class T, int kWidth>
struct GradQueryShared {
  using Queries = Tile<T, kBlockRows, kWidth>;
  using Keys = KeyPipeline<T, kPassedRows<T, kWidth>, kWidth>;
  static constexpr int kBytes = 2 * Queries::kBytes + Keys::kBytes;
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kWidth>)
    attention_grad_query(const AttentionBackwardArgs args, const Plan plan) {
  using Shared = GradQueryShared<T, kWidth>;
  constexpr int kKeys = kPassedRows<T, kWidth>;
  const AttentionInputs& in = args.in;
  const unsigned index = blockIdx.x / plan.tiles, place_in_head = blockIdx.x % plan.tiles;
  // Causal: the last queries see the most keys, so they go first.
  const unsigned tile = in.causal ? plan.tiles - 1 - place_in_head : place_in_head;
  const Head at(in, plan, index / plan.heads, index % plan.heads);
  const int begin = static_cast<int>(tile) * kBlockRows;
  if (begin >= at.query_room) return;
  const bool idle = begin >= at.query_count;
  const int row = warp_index() * kWarpRows;

  const typename Shared::Queries queries{dynamic_shared()}, grads{queries.base + Shared::Queries::kBytes};
  typename Shared::Keys keys(in, plan, at, idle ? 0 : at.keys_seen(begin + kBlockRows),
                             grads.base + Shared::Queries::kBytes);
  const Dropout dropout(in, plan);
  const auto counts = [&](int r) { return begin + r < at.query_count; };
  const int first = at.query_first;
  copy_rows(queries, token_rows<T>(in.q, at.batch, at.head, first, in.width, plan.q), begin, counts);
  copy_rows(grads, token_rows<T>(args.grad_out, at.batch, at.head, first, in.width, plan.grad_out), begin, counts);
  const QueryRows rows(args, at, begin + row);
  keys.start();

  float dq[kWidth / 8][4] = {};
  for (int t = 0; t < keys.tiles(); ++t) {
    keys.begin(t);
    const Place<false> place{begin + row, t * kKeys};
    const KeyFactor* factors = keys.factors(t);
    const bool factored = keys.factored(t);
    float p[kKeys / 8][4], ds[kKeys / 8][4];
    multiply_rows(p, queries, row, keys.keys(t));
    score_queries(p, at, place, factors, factored);
    weigh_queries(p, rows.lse, place, factors, factored);
    multiply_rows(ds, grads, row, keys.values(t));
    if (dropout.on) drop(ds, dropout.keep<kKeys / 8>(at, place), dropout.rescale);
    differentiate_queries(p, ds, rows);
    multiply_accumulated(dq, ds, keys.keys(t), static_cast<int>(in.width));
    keys.end(t);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = begin + row + (lane_index() >> 2) + 8 * half;
    if (query >= at.query_room) continue;
    store_row(args.grad_q.at<T>(at.batch, at.head, first + query), static_cast<int>(in.width), dq, half, plan.scale,
              rows.takes_part(half));
  }
}

struct GradQuery {
  template <class T, int kWidth>
  static cudaError_t launch(const AttentionBackwardArgs& args, Plan plan, cudaStream_t stream) {
    plan.tiles = tiles_of(args.in.queries, kBlockRows);
    return launch_blocks(attention_grad_query<T, kWidth>, args, plan, args.in.batch * args.in.heads * plan.tiles,
                         kThreads, GradQueryShared<T, kWidth>::kBytes, stream);
  }
};

}  // namespace

cudaError_t launch_attention_grad_query(const AttentionBackwardArgs& args, const Plan& plan, cudaStream_t stream) {
  return dispatch_attention<GradQuery>(args.in, args, plan, stream);
}

}  // namespace mmer
