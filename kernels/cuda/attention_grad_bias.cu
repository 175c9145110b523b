// The gradient of the bias:   db_ij = sum ds_ij   over the samples, heads and queries that share an entry
//
// A block owns 64 queries (all of them where the bias has one row) and a tile of keys of the bias, and passes through
// the samples and heads that read it. It works the scores out again rather than have them written: B H L S floats.
#include "attention_backward.cuh"

namespace mmer {
namespace {

template <class T, int kWidth>
inline constexpr int kBiasKeys = sizeof(T) == 2 ? 64 : 32;

template <class T, int kWidth>
struct GradBiasShared {
  using Queries = Tile<T, kBlockRows, kWidth>;
  using Keys = Tile<T, kBiasKeys<T, kWidth>, kWidth>;
  static constexpr int kFactorBytes = kBiasKeys<T, kWidth> * static_cast<int>(sizeof(KeyFactor));
  static constexpr int kBytes = 2 * Queries::kBytes + 2 * Keys::kBytes + kFactorBytes;
};

// Numbers begin, begin + 1, ... of a dimension that a block passes through: all of them, or its own where the bias
// has that dimension.
struct Passed {
  int64_t begin, end;

  __device__ __forceinline__ Passed(int64_t own, int64_t bias_size, int64_t size)
      : begin(bias_size == 1 ? 0 : own), end(bias_size == 1 ? size : own + 1) {}
};

// The column sums of a block's 64 rows, in the first entries of the first warp's first row.
template <int kTiles>
__device__ __forceinline__ void sum_rows(float (&db)[kTiles][4], float* scratch) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float x = db[n][e] + db[n][e + 2];
      for (int distance = 4; distance < 32; distance *= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
      db[n][e] = x;
    }
  }
  __syncthreads();  // every warp is done with the tiles, whose memory is the scratch
  const Place<false> place{0, 0};
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (lane_index() < 4) scratch[warp_index() * 8 * kTiles + place.column(n, e)] = db[n][e];
    }
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      db[n][e] = 0.0f;
      for (int w = 0; w < kWarps; ++w) db[n][e] += scratch[w * 8 * kTiles + place.column(n, e)];
    }
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) attention_grad_bias(const AttentionBackwardArgs args, const Plan plan) {
  using Shared = GradBiasShared<T, kWidth>;
  constexpr int kKeys = kBiasKeys<T, kWidth>;
  const AttentionInputs& in = args.in;
  const unsigned key_tiles = static_cast<unsigned>(in.keys + kKeys - 1) / kKeys, index = blockIdx.x / key_tiles;
  const unsigned bias_heads = static_cast<unsigned>(in.bias_heads);
  const int key_begin = static_cast<int>(blockIdx.x % key_tiles) * kKeys;
  const unsigned own_tile = index % plan.tiles, own_head = index / plan.tiles % bias_heads;
  const unsigned own_batch = index / plan.tiles / bias_heads;
  const Passed batches(own_batch, in.bias_batches, in.batch), heads(own_head, in.bias_heads, in.heads);
  const Passed tiles(own_tile, in.bias_queries, (in.queries + kBlockRows - 1) / kBlockRows);
  const int row = warp_index() * kWarpRows, width = static_cast<int>(in.width);

  const typename Shared::Queries queries{dynamic_shared()}, grads{queries.base + Shared::Queries::kBytes};
  const typename Shared::Keys keys{grads.base + Shared::Queries::kBytes}, values{keys.base + Shared::Keys::kBytes};
  KeyFactor* factors = shared_pointer<KeyFactor>(values.base + Shared::Keys::kBytes);
  const Dropout dropout(in, plan);

  float db[kKeys / 8][4] = {};
  for (int64_t b = batches.begin; b < batches.end; ++b) {
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      const Head at(in, plan, b, h);
      if (key_begin >= at.key_count) break;
      const int64_t key_head = static_cast<unsigned>(h) / plan.group;
      const KeyWeights weights(in, at);
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
        const int begin = static_cast<int>(tile) * kBlockRows;
        if (begin >= at.query_count || key_begin >= at.keys_seen(begin + kBlockRows)) continue;
        __syncthreads();  // every warp is done with what the memory held
        if (threadIdx.x < kKeys) {
          factors[threadIdx.x] = KeyFactor::of(weights, key_begin + static_cast<int>(threadIdx.x));
        }
        const auto counts = [&](int r) { return begin + r < at.query_count; };
        copy_rows(queries, token_rows<T>(in.q, b, h, at.query_first, width, plan.q), begin, counts);
        copy_rows(grads, token_rows<T>(args.grad_out, b, h, at.query_first, width, plan.grad_out), begin, counts);
        __syncthreads();  // the factors, for the copies
        const auto taken = [&](int r) { return !factors[r].excluded(); };
        copy_rows(keys, token_rows<T>(in.k, b, key_head, at.key_first, width, plan.k), key_begin, taken);
        copy_rows(values, token_rows<T>(in.v, b, key_head, at.key_first, width, plan.v), key_begin, taken);
        const QueryRows rows(args, at, begin + row);
        copy_wait();
        __syncthreads();  // the tiles

        const Place<false> place{begin + row, key_begin};
        float p[kKeys / 8][4], ds[kKeys / 8][4];
        multiply_rows(p, queries, row, keys);
        score_queries(p, at, place, factors, true);
        weigh_queries(p, rows.lse, place, factors, true);
        multiply_rows(ds, grads, row, values);
        if (dropout.on) drop(ds, dropout.keep<kKeys / 8>(at, place), dropout.rescale);
        differentiate_queries(p, ds, rows);
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) db[i / 4][i % 4] += rows.takes_part(i % 4 / 2) ? ds[i / 4][i % 4] : 0.0f;
      }
    }
  }

  const bool one_row = in.bias_queries == 1;
  if (one_row) sum_rows(db, shared_pointer<float>(queries.base));
  const Place<false> place{one_row ? row : static_cast<int>(own_tile) * kBlockRows + row, key_begin};
  float* out = args.grad_bias + static_cast<int64_t>(own_batch * bias_heads + own_head) * in.bias_queries * in.keys;
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) {
    const int query = place.query_of(i / 4, i % 4), key = place.key_of(i / 4, i % 4);
    if (query < in.bias_queries && key < in.keys) out[query * in.keys + key] = db[i / 4][i % 4];
  }
}

struct GradBias {
  template <class T, int kWidth>
  static cudaError_t launch(const AttentionBackwardArgs& args, Plan plan, cudaStream_t stream) {
    const AttentionInputs& in = args.in;
    plan.tiles = in.bias_queries == 1 ? 1 : tiles_of(in.bias_queries, kBlockRows);
    const int64_t key_tiles = tiles_of(in.keys, kBiasKeys<T, kWidth>);
    return launch_blocks(attention_grad_bias<T, kWidth>, args, plan,
                         in.bias_batches * in.bias_heads * plan.tiles * key_tiles, kThreads,
                         GradBiasShared<T, kWidth>::kBytes, stream);
  }
};

}  // namespace

cudaError_t launch_attention_grad_bias(const AttentionBackwardArgs& args, const Plan& plan, cudaStream_t stream) {
  return dispatch_attention<GradBias>(args.in, args, plan, stream);
}

}  // namespace mmer
