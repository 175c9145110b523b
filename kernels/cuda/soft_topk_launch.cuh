// How a batch of rows is laid over the device: dtype dispatch, grids, clusters, shared memory.
//
// The kernels run on the host too, where other headers define what is CUDA's own (tests/kernels/cuda_emulation).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>

#include "../common/soft_topk_args.h"

namespace mmer {

inline constexpr int kShortThreads = 128;  // at most; a warp a block while the rows would not fill the device
// Blocks a multiprocessor that the registers are budgeted for, by the bytes of a row that a lane holds.
constexpr int short_blocks(int bytes) { return bytes <= 128 ? 3 : 2; }
inline constexpr int kLongThreads = 256;
inline constexpr int kLongBlocks = 2;       // blocks a multiprocessor that their registers are budgeted for
inline constexpr int kFixedShared = 10240;  // bytes that a block of a long row has before the staged entries
inline constexpr int kDriverShared = 1024;  // bytes a block that the driver keeps
inline constexpr int kLongWarps = kLongThreads / 32;
inline constexpr int kBatchPacks = 4;  // packs that a thread of a long row has in flight
inline constexpr int kMaxRanks = 16;   // blocks of a cluster

#if defined(__CUDACC__)
// A block's shared memory: kFixedShared bytes for what the kernel keeps there, then the staged entries.
__device__ __forceinline__ unsigned char* block_shared() {
  extern __shared__ __align__(16) unsigned char block_shared_bytes[];
  return block_shared_bytes;
}
#endif

// The part of a long row that each block of its team has, and how much of it is kept in shared memory.
struct TeamShape {
  int ranks;   // blocks that share a row
  int slice;   // entries of one block, a multiple of its span except where the row ends
  int staged;  // of these, the first ones, kept in shared memory; a multiple of the span
};

// Entries that a block of a long row handles in one batch.
inline __host__ __device__ constexpr int team_span(int compute_size) {
  return kLongThreads * kBatchPacks * (16 / compute_size);
}

static_assert(kLongestCudaRow + kMaxRanks * team_span(4) <= INT_MAX,
              "columns have 32 bits, those behind a row's end too");

template <typename Operation, typename Args>
cudaError_t dispatch_rows(const Args& args, const SoftTopKRows& in, cudaStream_t stream) {
  if (in.rows == 0) return cudaSuccess;
  if (in.rows < 0 || in.cols < 0 || in.cols > kLongestCudaRow) return cudaErrorInvalidValue;
  if (in.dtype == DType::kFloat64) return Operation::template launch<double>(args, stream);
  return Operation::template launch<float>(args, stream);
}

// Short rows: `lanes` of a warp have one.
template <typename Args>
cudaError_t launch_short(void (*kernel)(Args), const Args& args, int lanes, cudaStream_t stream) {
  const int64_t rows_per_warp = 32 / lanes;
  const int64_t warps = (args.in.rows + rows_per_warp - 1) / rows_per_warp;
  const int warps_per_block = warps >= 1024 ? kShortThreads / 32 : 1;  // spread few rows over many multiprocessors
  const int64_t blocks = (warps + warps_per_block - 1) / warps_per_block;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(32 * warps_per_block));
  config.stream = stream;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, args);
  return status != cudaSuccess ? status : cudaGetLastError();
}

// What decides the shape of a team.
struct DeviceLimits {
  int multiprocessors, shared_per_multiprocessor, shared_per_block, major;
};

inline cudaError_t device_limits(DeviceLimits& limits) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, device);
  };
  read(limits.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(limits.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  read(limits.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(limits.major, cudaDevAttrComputeCapabilityMajor);
  return status;
}

// A slice for each of `ranks` blocks, with as much of it in shared memory as leaves room for `blocks_per_sm`.
inline TeamShape team_shape(int64_t cols, int ranks, int blocks_per_sm, int compute_size, const DeviceLimits& limits) {
  const int span = team_span(compute_size);
  const int64_t spans = (cols + span - 1) / span;
  const int slice_spans = static_cast<int>((spans + ranks - 1) / ranks);
  const int room = std::min(limits.shared_per_block - kFixedShared,
                            limits.shared_per_multiprocessor / blocks_per_sm - kFixedShared - kDriverShared);
  const int staged_spans = std::min(slice_spans, std::max(room, 0) / (span * compute_size));
  return {ranks, slice_spans * span, staged_spans * span};
}

// Few long rows: as many blocks a row as keep the device busy, each with at least two spans, where the architecture
// has thread-block clusters; else one block a row.
template <typename Args>
cudaError_t launch_long(void (*kernel)(Args, TeamShape), const Args& args, const SoftTopKRows& in, int compute_size,
                        cudaStream_t stream, bool stages = true) {
  DeviceLimits limits{};
  cudaError_t status = device_limits(limits);
  if (status != cudaSuccess) return status;
  int ranks = 1;
  if (limits.major >= 9) {
    const int64_t spans = in.cols / team_span(compute_size);
    while (ranks < kMaxRanks && in.rows * ranks * 2 <= limits.multiprocessors && spans >= 4 * ranks) ranks *= 2;
  }
  if (ranks > 1) {  // code that the driver compiled from the PTX of an older architecture has no clusters
    cudaFuncAttributes attributes{};
    status = cudaFuncGetAttributes(&attributes, kernel);
    if (status != cudaSuccess) return status;
    if (attributes.ptxVersion < 90) ranks = 1;
  }
  for (;; ranks /= 2) {
    const int64_t blocks = in.rows * ranks;
    if (blocks > INT_MAX) return cudaErrorInvalidValue;
    const int blocks_per_sm = blocks > limits.multiprocessors ? kLongBlocks : 1;
    TeamShape shape = team_shape(in.cols, ranks, blocks_per_sm, compute_size, limits);
    if (!stages) shape.staged = 0;

    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kLongThreads);
    config.dynamicSmemBytes = kFixedShared + static_cast<size_t>(shape.staged) * compute_size;
    config.stream = stream;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(config.dynamicSmemBytes));
    if (status != cudaSuccess) return status;
    cudaLaunchAttribute cluster{};
    if (ranks > 1) {
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = static_cast<unsigned>(ranks);
      cluster.val.clusterDim.y = 1;
      cluster.val.clusterDim.z = 1;
      config.attrs = &cluster;
      config.numAttrs = 1;
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      if (status != cudaSuccess) return status;
      int resident = 0;  // 0 where no part of the device has room for so large a cluster
      status = cudaOccupancyMaxActiveClusters(&resident, kernel, &config);
      if (status != cudaSuccess) return status;
      if (resident == 0) continue;
    }
    status = cudaLaunchKernelEx(&config, kernel, args, shape);
    return status != cudaSuccess ? status : cudaGetLastError();
  }
}

}  // namespace mmer
