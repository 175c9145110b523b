// The gradients of the keys, the values and the keys' weights:
//
//     dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i keep_ij / (1 - p_drop) p_ij do_i
//     dm_j = sum_i e_ij (dP_ij - delta_i)
//
// A block owns 64 keys of a key head, the rows of its products (k q^T and v do^T), and passes through the queries of
// all heads that it serves. A key's row never enters another's, so keys that are left out need no zeros in memory.
#include "attention_backward.cuh"

namespace mmer {
namespace {

// log-sum-exp, to base 2 and +infinity where the query takes no part, and delta.
struct QueryFactor {
  float lse, delta;
};

// Tiles of queries and upstream gradients, of head after head. The stages of the pipeline, as in KeyPipeline, are
// the products of step t, the copies of step t + 1 and the loads of the factors of step t + 2, which say what is copied
// at all: a query that takes no part is 0 in the tile, whatever it and its upstream gradient hold.
template <class T, int kQueries, int kWidth>
class QueryPipeline {
 public:
  using Rows = Tile<T, kQueries, kWidth>;
  static constexpr int kBytes = 4 * Rows::kBytes + 3 * kQueries * static_cast<int>(sizeof(QueryFactor));
  static_assert(kQueries <= kThreads, "a thread a query");

  struct Step {
    int head, tile;
  };

  // Tiles [first_tile, end_tile), at least one, of the heads before end_head.
  __device__ __forceinline__ QueryPipeline(const AttentionBackwardArgs& args, const Plan& plan, int first_tile,
                                           int end_tile, int end_head, uint32_t shared)
      : args_(args), plan_(plan), first_tile_(first_tile), end_tile_(end_tile), end_head_(end_head), shared_(shared) {}

  __device__ __forceinline__ Rows queries(int step) const {
    return {shared_ + static_cast<uint32_t>(step % 2 * 2 * Rows::kBytes)};
  }
  __device__ __forceinline__ Rows grads(int step) const { return {queries(step).base + Rows::kBytes}; }
  __device__ __forceinline__ QueryFactor* factors(int step) const {
    return shared_pointer<QueryFactor>(shared_ + 4 * Rows::kBytes) + step % 3 * kQueries;
  }

  // `at`: any head of the sample, here and below.
  __device__ __forceinline__ void start(int head, const Head& at) {
    for (int step = 0; step < 2; ++step) {
      load_factor(after({head, first_tile_}, step), at);
      store_factor(step);
    }
    __syncthreads();  // the factors, for the copies
    copy(0, {head, first_tile_}, at);
  }

  // Afterwards the tile is there. Every warp is done with the one before it, whose memory the copies and the factors
  // that are begun here may take.
  __device__ __forceinline__ void begin(int step, Step here, const Head& at) {
    copy_wait();
    __syncthreads();
    copy(step + 1, after(here, 1), at);
    load_factor(after(here, 2), at);
  }

  __device__ __forceinline__ void end(int step) { store_factor(step + 2); }

 private:
  __device__ __forceinline__ Step after(Step here, int steps) const {
    here.tile += steps;
    for (; here.tile >= end_tile_; here.tile -= end_tile_ - first_tile_) ++here.head;
    return here;
  }

  __device__ __forceinline__ void load_factor(Step here, const Head& at) {
    if (threadIdx.x >= kQueries || here.head >= end_head_) return;
    const int query = here.tile * kQueries + static_cast<int>(threadIdx.x);
    next_.lse = base2_lse(args_.lse, at, here.head, query);
    next_.delta = query < at.query_count ? *args_.delta.at(at.batch, here.head, at.query_first + query) : 0.0f;
  }
  __device__ __forceinline__ void store_factor(int step) {
    if (threadIdx.x < kQueries) factors(step)[threadIdx.x] = next_;
  }

  __device__ __forceinline__ void copy(int step, Step here, const Head& at) {
    if (here.head >= end_head_) return;
    const AttentionInputs& in = args_.in;
    const QueryFactor* of = factors(step);
    const auto taken = [&](int r) { return of[r].lse != positive_infinity(); };
    const int begin = here.tile * kQueries, first = at.query_first;
    copy_rows(queries(step), token_rows<T>(in.q, at.batch, here.head, first, in.width, plan_.q), begin, taken);
    copy_rows(grads(step), token_rows<T>(args_.grad_out, at.batch, here.head, first, in.width, plan_.grad_out), begin,
              taken);
  }

  const AttentionBackwardArgs& args_;
  const Plan& plan_;
  int first_tile_, end_tile_, end_head_;
  uint32_t shared_;
  QueryFactor next_ = {0.0f, 0.0f};
};

// Of a lane's two keys, g and g + 8, in one head. m = weight 2^exponent: for queries that see no key of more weight, a
// faint one has 2^-40 in the exponent of e, which float32 would not hold without; a smaller power would lose dm beside
// keys of ordinary weight.
struct KeyRows {
  float weight[2], exponent[2], grad[2];  // exponent: -infinity where left out; grad: the lane's share of dm 2^exponent

  __device__ __forceinline__ bool live(int half) const { return exponent[half] != negative_infinity(); }

  __device__ __forceinline__ KeyRows(const AttentionInputs& in, const Head& at, int first) {
    const KeyWeights weights(in, at);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = first + (lane_index() >> 2) + 8 * half;
      const bool valid = weights.valid(key);
      const float m = valid ? weights(key) : 0.0f;
      const bool faint = m > 0.0f && m < kFaint;
      weight[half] = faint ? m * kRaise : m;
      exponent[half] = faint ? -kRaiseExponent : 0.0f;
      if (!valid || (m == 0.0f && !in.exact_zero_weight_grad)) exponent[half] = negative_infinity();
      grad[half] = 0.0f;
    }
  }

  // Scores y to p, in place; dp = do . v, after dropout, to ds, in place.
  template <int kTiles>
  __device__ __forceinline__ void differentiate(float (&y)[kTiles][4], float (&dp)[kTiles][4],
                                                const QueryFactor* factors, const Place<true>& place) {
    constexpr float kLargestExponent = 110.0f;  // which only m = 0 passes: the log-sum-exp does not bound it there
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      const int half = i % 4 / 2;
      const QueryFactor& query = factors[place.column(i / 4, i % 4)];
      const float power = y[i / 4][i % 4] - query.lse + exponent[half];
      const float e = exp2_fast(power > kLargestExponent ? kLargestExponent : power);  // NaN stays
      const float distance = dp[i / 4][i % 4] - query.delta;
      grad[half] += live(half) ? e * distance : 0.0f;
      y[i / 4][i % 4] = live(half) ? e * weight[half] : 0.0f;
      dp[i / 4][i % 4] = live(half) ? y[i / 4][i % 4] * distance : 0.0f;
    }
  }

  // The lane's share.
  __device__ __forceinline__ float grad_weight(int half) const {
    return exponent[half] == -kRaiseExponent ? grad[half] * kRaise : grad[half];
  }

 private:
  static constexpr float kFaint = 0x1p-100f, kRaise = 0x1p40f, kRaiseExponent = 40.0f;
};

template <class T, int kWidth>
struct GradKeyShared {
  using Keys = Tile<T, kBlockRows, kWidth>;
  using Queries = QueryPipeline<T, kPassedRows<T, kWidth>, kWidth>;
  static constexpr int kBytes = 2 * Keys::kBytes + Queries::kBytes;
};

// Another head of the sample: from what is in registers, or read again.
template <bool kHeld>
__device__ __forceinline__ Head head_of(const Head& sample, const AttentionInputs& in, const Plan& plan, int h) {
  if constexpr (kHeld) {
    return sample.with_head(in, h);
  } else {
    return Head(in, plan, sample.batch, h);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kWidth>)
    attention_grad_key(const AttentionBackwardArgs args, const Plan plan) {
  using Shared = GradKeyShared<T, kWidth>;
  constexpr int kQueries = kPassedRows<T, kWidth>;
  constexpr bool kTight = kBlocks<T, kWidth> > 2;  // few registers
  const AttentionInputs& in = args.in;
  const unsigned index = blockIdx.x / plan.tiles;
  const int batch = static_cast<int>(index / plan.key_heads), key_head = static_cast<int>(index % plan.key_heads);
  const int group = static_cast<int>(plan.group), first_head = key_head * group;
  const int begin = static_cast<int>(blockIdx.x % plan.tiles) * kBlockRows;
  const Head sample(in, plan, batch, first_head);
  if (begin >= sample.key_room) return;
  const int row = warp_index() * kWarpRows;

  // Causal: the queries before the first key of the block see none of it.
  const int first_tile = in.causal ? begin / kQueries : 0, end_tile = (sample.query_count + kQueries - 1) / kQueries;
  const bool idle = begin >= sample.key_count || first_tile >= end_tile;

  const typename Shared::Keys keys{dynamic_shared()}, values{keys.base + Shared::Keys::kBytes};
  typename Shared::Queries queries(args, plan, first_tile, end_tile, first_head + group,
                                   values.base + Shared::Keys::kBytes);
  const Dropout dropout(in, plan);
  if (!idle) {
    const auto counts = [&](int r) { return begin + r < sample.key_count; };
    copy_rows(keys, token_rows<T>(in.k, batch, key_head, sample.key_first, in.width, plan.k), begin, counts);
    copy_rows(values, token_rows<T>(in.v, batch, key_head, sample.key_first, in.width, plan.v), begin, counts);
    queries.start(first_head, sample);
  }

  float dk[kWidth / 8][4] = {}, dv[kWidth / 8][4] = {};
  bool taken[2] = {false, false};  // by any head
  int step = 0;
  for (int h = first_head; h < first_head + group; ++h) {
    const Head at = head_of<kTight>(sample, in, plan, h);
    KeyRows rows(in, at, begin + row);
    for (int tile = first_tile; !idle && tile < end_tile; ++tile, ++step) {
      queries.begin(step, {h, tile}, at);
      const Place<true> place{tile * kQueries, begin + row};
      float p[kQueries / 8][4], ds[kQueries / 8][4];
      multiply_rows(p, keys, row, queries.queries(step));
      score(p, at, place, [&](int, int e) { return rows.live(e >> 1); });
      if constexpr (kTight) __syncwarp();  // operands loaded ahead, before this product, cost too many
      multiply_rows(ds, values, row, queries.grads(step));
      const uint32_t kept = dropout.on ? dropout.keep<kQueries / 8>(at, place) : 0;
      if (dropout.on) drop(ds, kept, dropout.rescale);
      rows.differentiate(p, ds, queries.factors(step), place);
      if (dropout.on) drop(p, kept, dropout.rescale);
      if constexpr (kTight) __syncwarp();
      multiply_accumulated(dv, p, queries.grads(step), static_cast<int>(in.width));
      if constexpr (kTight) __syncwarp();
      multiply_accumulated(dk, ds, queries.queries(step), static_cast<int>(in.width));
      queries.end(step);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      taken[half] = taken[half] || rows.live(half);
      const float dm = quad_sum(rows.grad_weight(half));
      const int key = begin + row + (lane_index() >> 2) + 8 * half;
      if (args.grad_weights.data != nullptr && lane_index() % 4 == 0 && key < at.key_room) {
        *args.grad_weights.at(batch, at.head, at.key_first + key) = dm;
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = begin + row + (lane_index() >> 2) + 8 * half;
    if (key >= sample.key_room) continue;
    const int width = static_cast<int>(in.width);
    store_row(args.grad_k.at<T>(batch, key_head, sample.key_first + key), width, dk, half, plan.scale, taken[half]);
    store_row(args.grad_v.at<T>(batch, key_head, sample.key_first + key), width, dv, half, 1.0f, taken[half]);
  }
}

struct GradKey {
  template <class T, int kWidth>
  static cudaError_t launch(const AttentionBackwardArgs& args, Plan plan, cudaStream_t stream) {
    plan.tiles = tiles_of(args.in.keys, kBlockRows);
    return launch_blocks(attention_grad_key<T, kWidth>, args, plan, args.in.batch * args.in.key_heads * plan.tiles,
                         kThreads, GradKeyShared<T, kWidth>::kBytes, stream);
  }
};

}  // namespace

cudaError_t launch_attention_grad_key(const AttentionBackwardArgs& args, const Plan& plan, cudaStream_t stream) {
  return dispatch_attention<GradKey>(args.in, args, plan, stream);
}

}  // namespace mmer
