// How tensors are laid over the device: entries in chunks that blocks take in turn, a table of tensors with each
// launch.
//
// A chunk holds entries of one tensor. Every tensor has at least one chunk, an empty tensor an empty one, so that each
// is visited and its norm is written. Where a chunk begins depends on sizes alone, not on the device, and so do sums
// over chunks.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>

#include "attention_warp.cuh"
#include "perturbation.h"

namespace mmer {

inline constexpr int kPerturbationThreads = 256;
inline constexpr int kPerturbationBlocks = 4;  // a multiprocessor; registers are budgeted for them
inline constexpr int kFewTensors = 120;        // whose table is under 4 KB: launched faster than a long one

// A chunk has 2^shift entries, the last one of a tensor fewer: 8192 while so few occupy the device, up to 65536 for
// many entries, because every block that moves weights reads all the parts of their norm.
struct ChunkPlan {
  int shift;
  int64_t chunks;

  static constexpr int kShortest = 13, kLongest = 16;
  static constexpr int64_t kEnough = 2048;

  int64_t chunks_of(int64_t n) const { return std::max<int64_t>(1, (n + (int64_t(1) << shift) - 1) >> shift); }
};

// False where there are more entries than any memory holds. Chunks are counted in 31 bits.
inline bool plan_chunks(const PerturbationTensor* tensors, int64_t count, ChunkPlan& plan) {
  constexpr int64_t kMost = int64_t(1) << 46;
  int64_t entries = 0;
  for (int64_t t = 0; t < count; ++t) {
    if (tensors[t].n < 0 || tensors[t].n > kMost - entries) return false;
    entries += tensors[t].n;
  }
  plan = {ChunkPlan::kShortest, 0};
  while (plan.shift < ChunkPlan::kLongest && entries >> plan.shift > ChunkPlan::kEnough) ++plan.shift;
  for (int64_t t = 0; t < count; ++t) plan.chunks += plan.chunks_of(tensors[t].n);
  return plan.chunks <= INT_MAX;
}

__host__ __device__ __forceinline__ bool is_global(const PerturbationArgs& args) {
  return args.scope == PerturbationScope::kGlobal;
}
__host__ __device__ __forceinline__ bool is_awp(const PerturbationArgs& args) {
  return args.scope == PerturbationScope::kAwp;
}

struct DeviceChunk {
  int tensor;  // of the table
  bool first;  // of its tensor
  int count;   // entries, which begin at the pointers
  DType weight_dtype, grad_dtype;
  void *weight, *stash;
  const void* grad;
};

// The tensors of one launch, a parameter of its kernels.
template <int kCapacity>
struct PerturbationTable {
  static constexpr int kTensors = kCapacity;

  void* weight[kCapacity];
  const void* grad[kCapacity];
  void* stash[kCapacity];
  uint32_t first[kCapacity + 1];  // chunk of each tensor, counted from 0 in every launch, and their number
  uint32_t last[kCapacity];       // entries of the last chunk << 4 | dtype of the weight << 2 | dtype of the gradient
  int count, shift;
  int64_t first_tensor, first_chunk;  // among those of all launches

  __host__ __device__ __forceinline__ uint32_t chunks() const { return first[count]; }

  void add(const PerturbationTensor& tensor, const ChunkPlan& plan) {
    const int64_t chunks = plan.chunks_of(tensor.n), rest = tensor.n - ((chunks - 1) << shift);
    weight[count] = tensor.weight;
    grad[count] = tensor.grad;
    stash[count] = tensor.stash;
    last[count] = static_cast<uint32_t>(rest << 4) | static_cast<uint32_t>(tensor.weight_dtype) << 2 |
                  static_cast<uint32_t>(tensor.grad_dtype);
    first[count + 1] = first[count] + static_cast<uint32_t>(chunks);
    ++count;
  }

  __device__ __forceinline__ DeviceChunk chunk(uint32_t index) const {
    int low = 0, high = count;  // first[low] <= index < first[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first[middle] <= index ? low : high) = middle;
    }
    const uint32_t packed = last[low];
    const DType weight_dtype = static_cast<DType>(packed >> 2 & 3u), grad_dtype = static_cast<DType>(packed & 3u);
    const int64_t begin = static_cast<int64_t>(index - first[low]) << shift;
    const int64_t weight_begin = begin * entry_bytes(weight_dtype), grad_begin = begin * entry_bytes(grad_dtype);
    return {low,
            begin == 0,
            index + 1 == first[low + 1] ? static_cast<int>(packed >> 4) : 1 << shift,
            weight_dtype,
            grad_dtype,
            static_cast<char*>(weight[low]) + weight_begin,
            static_cast<char*>(stash[low]) + weight_begin,
            static_cast<const char*>(grad[low]) + grad_begin};
  }
};

// Norms of the chunks of all launches; weights: of the weights, with scope awp.
struct NormParts {
  double *norms, *weights;
  int64_t count;
};

static_assert(sizeof(PerturbationTable<kFewTensors>) + sizeof(PerturbationArgs) + sizeof(NormParts) <= 4096, "");
static_assert(sizeof(PerturbationTable<kPerturbationTensors>) + sizeof(PerturbationArgs) + sizeof(NormParts) <=
                  (kPerturbationTensors > kFewTensors ? 32764 : 4096),
              "");

template <int kCapacity, class Launch>
cudaError_t launch_table(const PerturbationTensor* tensors, int64_t first_tensor, int64_t count, int64_t& first_chunk,
                         const ChunkPlan& plan, Launch launch) {
  PerturbationTable<kCapacity> table{};
  table.shift = plan.shift;
  table.first_tensor = first_tensor;
  table.first_chunk = first_chunk;
  for (int64_t t = 0; t < count; ++t) table.add(tensors[first_tensor + t], plan);
  first_chunk += table.chunks();
  return launch(table);
}

// Calls launch(table) for as many tables as the tensors need, and for one without tensors where there are none.
template <class Launch>
cudaError_t launch_tables(const PerturbationTensor* tensors, int64_t count, const ChunkPlan& plan, Launch launch) {
  cudaError_t status = cudaSuccess;
  int64_t done = 0, chunk = 0;
  do {
    const int64_t now = std::min<int64_t>(count - done, kPerturbationTensors);
    status = now <= kFewTensors ? launch_table<kFewTensors>(tensors, done, now, chunk, plan, launch)
                                : launch_table<kPerturbationTensors>(tensors, done, now, chunk, plan, launch);
    done += now;
  } while (status == cudaSuccess && done < count);
  return status;
}

// As many blocks as there is work for, and as the device holds at a time.
template <class... Parameters>
cudaError_t launch_perturbation(void (*kernel)(Parameters...), int64_t work, int shared_bytes, cudaStream_t stream,
                                const Parameters&... arguments) {
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status != cudaSuccess) return status;
  const int64_t most = static_cast<int64_t>(multiprocessors) * kPerturbationBlocks;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::max<int64_t>(1, std::min(work, most))));
  config.blockDim = dim3(kPerturbationThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  status = cudaLaunchKernelEx(&config, kernel, arguments...);
  return status != cudaSuccess ? status : cudaGetLastError();
}

}  // namespace mmer
