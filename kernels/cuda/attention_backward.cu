// Attention backward: delta_i = do_i . o_i - dL/dlse_i here, then one kernel for each owner of sums.
//
// A query without a key has delta 0 and no gradient, whatever its upstream gradients hold.
#include "attention_backward.cuh"

namespace mmer {
namespace {

inline constexpr int kDeltaLanes = 8;  // that share a query
inline constexpr int kDeltaRows = kThreads / kDeltaLanes;

template <class T>
__device__ __forceinline__ float dot(const T* x, const T* y, int width, int lane) {
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));
  struct alignas(16) Chunk {
    T entries[kPerChunk];
  };
  float sum = 0.0f;
  int done = 0;
  if ((reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y)) % 16 == 0) {
    done = width / kPerChunk * kPerChunk;
#pragma unroll 1
    for (int d = lane * kPerChunk; d < done; d += kDeltaLanes * kPerChunk) {
      const Chunk a = *reinterpret_cast<const Chunk*>(x + d), b = *reinterpret_cast<const Chunk*>(y + d);
#pragma unroll
      for (int e = 0; e < kPerChunk; ++e) sum += to_float(a.entries[e]) * to_float(b.entries[e]);
    }
  }
#pragma unroll 1
  for (int d = done + lane; d < width; d += kDeltaLanes) sum += to_float(x[d]) * to_float(y[d]);
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) attention_delta(const AttentionBackwardArgs args, const Plan plan) {
  const AttentionInputs& in = args.in;
  const unsigned index = blockIdx.x / plan.tiles, b = index / plan.heads, h = index % plan.heads;
  const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes;
  const int64_t query = static_cast<int64_t>(blockIdx.x % plan.tiles) * kDeltaRows + threadIdx.x / kDeltaLanes;
  const AttentionSpan span = in.query_span(b);
  float sum = 0.0f;
  if (query < span.count) {
    const int64_t token = span.first + query;
    sum = dot(args.grad_out.at<T>(b, h, token), args.out.at<T>(b, h, token), static_cast<int>(in.width), lane);
  }
#pragma unroll
  for (int distance = 1; distance < kDeltaLanes; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (query >= span.room || lane != 0) return;
  const int64_t token = span.first + query;
  const bool any = query < span.count && *args.lse.at(b, h, token) != negative_infinity();
  if (any && args.grad_lse.data != nullptr) sum -= *args.grad_lse.at(b, h, token);
  *args.delta.at(b, h, token) = any ? sum : 0.0f;
}

struct Delta {
  template <class T, int kWidth>
  static cudaError_t launch(const AttentionBackwardArgs& args, Plan plan, cudaStream_t stream) {
    plan.tiles = tiles_of(args.in.queries, kDeltaRows);
    return launch_blocks(attention_delta<T>, args, plan, args.in.batch * args.in.heads * plan.tiles, kThreads, 0,
                         stream);
  }
};

}  // namespace

cudaError_t attention_backward_cuda(const AttentionBackwardArgs& args, cudaStream_t stream) {
  const AttentionInputs& in = args.in;
  Plan plan = attention_plan(in);
  plan.grad_out = aligned_tokens(args.grad_out, in.dtype);
  cudaError_t status = dispatch_attention<Delta>(in, args, plan, stream);
  if (status == cudaSuccess) status = launch_attention_grad_query(args, plan, stream);
  if (status == cudaSuccess) status = launch_attention_grad_key(args, plan, stream);
  if (status == cudaSuccess && args.grad_bias != nullptr) status = launch_attention_grad_bias(args, plan, stream);
  return status;
}

}  // namespace mmer
