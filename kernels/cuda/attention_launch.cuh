// How a batch is laid over the device: dtype and width to a kernel, one dimension of blocks, shared memory.
#pragma once

#include <cuda_runtime.h>

#include <climits>

#include "../common/attention_args.h"
#include "../common/philox.h"
#include "attention_warp.cuh"

namespace mmer {

inline constexpr int kMaxWidth = 128;
inline constexpr float kLog2E = 1.44269504088896340736f;

// What the host works out once for all blocks. Blocks are counted in 32 bits, whose divisions are cheap.
struct Plan {
  unsigned tiles, heads, key_heads, group;  // blocks of a head; H, Hk and H / Hk
  bool q, k, v, grad_out;                   // whether every token of the array begins at a multiple of 16 bytes
  float scale, score_scale;                 // score_scale: log2(e) scale
  float dropout_rescale;                    // 1 / (1 - q), philox.h
  uint32_t dropped_of_65536;                // q 2^16
};

inline bool aligned_tokens(const AttentionArray& array, DType dtype) {
  const int64_t size = entry_bytes(dtype);
  const auto aligned = [](int64_t bytes) { return bytes % 16 == 0; };
  return aligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(array.data) % 16)) && aligned(array.batch * size) &&
         aligned(array.head * size) && aligned(array.token * size);
}

inline Plan attention_plan(const AttentionInputs& in) {
  Plan plan{};
  plan.heads = static_cast<unsigned>(in.heads);
  plan.key_heads = static_cast<unsigned>(in.key_heads);
  plan.group = in.key_heads > 0 ? plan.heads / plan.key_heads : 1;
  plan.q = aligned_tokens(in.q, in.dtype);
  plan.k = aligned_tokens(in.k, in.dtype);
  plan.v = aligned_tokens(in.v, in.dtype);
  plan.scale = static_cast<float>(in.scale);
  plan.score_scale = static_cast<float>(in.scale) * kLog2E;
  plan.dropout_rescale = static_cast<float>(dropout_scale(in.dropout_p));
  plan.dropped_of_65536 = dropped_of_65536(in.dropout_p);
  return plan;
}

// Calls Operation::launch<T, width> for the dtype and the least width that holds a head.
template <class Operation, class T, class... Args>
cudaError_t dispatch_width(int64_t width, const Args&... args) {
  if (width <= 32) return Operation::template launch<T, 32>(args...);
  if (width <= 64) return Operation::template launch<T, 64>(args...);
  if (width <= kMaxWidth) return Operation::template launch<T, kMaxWidth>(args...);
  return cudaErrorInvalidValue;
}

template <class Operation, class... Args>
cudaError_t dispatch_attention(const AttentionInputs& in, const Args&... args) {
  switch (in.dtype) {
    case DType::kFloat32: return dispatch_width<Operation, float>(in.width, args...);
    case DType::kBFloat16: return dispatch_width<Operation, BFloat16>(in.width, args...);
    case DType::kFloat16: return dispatch_width<Operation, Half>(in.width, args...);
    default: return cudaErrorInvalidValue;
  }
}

inline unsigned tiles_of(int64_t entries, int tile) { return static_cast<unsigned>((entries + tile - 1) / tile); }

template <class Args>
cudaError_t launch_blocks(void (*kernel)(Args, Plan), const Args& args, const Plan& plan, int64_t blocks, int threads,
                          int shared_bytes, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks < 0 || blocks > INT_MAX) return cudaErrorInvalidValue;
  if (shared_bytes > 48 * 1024) {  // more than a kernel gets without asking
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, args, plan);
  return status != cudaSuccess ? status : cudaGetLastError();
}

}  // namespace mmer
