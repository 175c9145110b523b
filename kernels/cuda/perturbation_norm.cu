// Norms of gradients, in two launches:
//
//     part_c = |u|_2 of a chunk c,   u_i = g_i;   adaptive: u_i = |w_i| g_i        perturbation_norm
//     norm = |(part_c)|_2 over the chunks of a group                               perturbation_combine
//
// Scope awp: the same of w. perturbation_apply combines the parts by itself.
#include "perturbation_sums.cuh"

namespace mmer {
namespace {

__device__ __forceinline__ ScaledSum chunk_sum(const void* x, DType dtype, int count) {
  ScaledSum sum;
  with_storage_type(dtype, [&](auto type) { sum = sum_squares(static_cast<const decltype(type)*>(x), count); });
  return sum;
}

__device__ __forceinline__ ScaledSum chunk_sum_of_products(const DeviceChunk& chunk) {
  ScaledSum sum;
  with_storage_type(chunk.weight_dtype, [&](auto weight_type) {
    with_storage_type(chunk.grad_dtype, [&](auto grad_type) {
      sum = sum_squared_products(static_cast<const decltype(weight_type)*>(chunk.weight),
                                 static_cast<const decltype(grad_type)*>(chunk.grad), chunk.count);
    });
  });
  return sum;
}

template <int kCapacity>
__global__ void __launch_bounds__(kPerturbationThreads, kPerturbationBlocks)
    perturbation_norm(const __grid_constant__ PerturbationTable<kCapacity> table, const PerturbationArgs args,
                      const NormParts parts) {
  BlockNorm block_norm(dynamic_shared());
  for (uint32_t c = blockIdx.x; c < table.chunks(); c += gridDim.x) {
    const DeviceChunk chunk = table.chunk(c);
    const double norm =
        block_norm(args.adaptive ? chunk_sum_of_products(chunk) : chunk_sum(chunk.grad, chunk.grad_dtype, chunk.count));
    if (threadIdx.x == 0) parts.norms[table.first_chunk + c] = norm;
    if (is_awp(args)) {
      const double weight_norm = block_norm(chunk_sum(chunk.weight, chunk.weight_dtype, chunk.count));
      if (threadIdx.x == 0) parts.weights[table.first_chunk + c] = weight_norm;
    }
  }
}

// One block per group.
template <int kCapacity>
__global__ void __launch_bounds__(kPerturbationThreads, kPerturbationBlocks)
    perturbation_combine(const __grid_constant__ PerturbationTable<kCapacity> table, const PerturbationArgs args,
                         const NormParts parts) {
  BlockNorm block_norm(dynamic_shared());
  const int groups = is_global(args) ? 1 : table.count;
  for (int group = static_cast<int>(blockIdx.x); group < groups; group += static_cast<int>(gridDim.x)) {
    const GroupNorms norms = group_norms(table, group, args, parts, block_norm);
    if (threadIdx.x != 0) continue;
    args.norms[table.first_tensor + group] = norms.norm;
    if (is_awp(args)) args.weight_norms[table.first_tensor + group] = norms.weight_norm;
  }
}

}  // namespace

cudaError_t launch_norm_parts(const PerturbationArgs& args, const ChunkPlan& plan, const NormParts& parts,
                              cudaStream_t stream) {
  return launch_tables(args.tensors, args.count, plan, [&](const auto& table) {
    constexpr int kTensors = std::decay_t<decltype(table)>::kTensors;
    if (table.chunks() == 0) return cudaSuccess;
    return launch_perturbation(perturbation_norm<kTensors>, table.chunks(), BlockNorm::kBytes, stream, table, args,
                               parts);
  });
}

int64_t perturbation_workspace_cuda(const PerturbationArgs& args) {
  ChunkPlan plan{};
  if (!plan_chunks(args.tensors, args.count, plan)) return sizeof(double);
  const int64_t parts = plan.chunks * (is_awp(args) ? 2 : 1);
  return static_cast<int64_t>(sizeof(double)) * std::max<int64_t>(1, parts);
}

cudaError_t perturbation_norm_cuda(const PerturbationArgs& args, void* workspace, cudaStream_t stream) {
  ChunkPlan plan{};
  if (!plan_chunks(args.tensors, args.count, plan) || args.given_norms != nullptr) return cudaErrorInvalidValue;
  const NormParts parts = norm_parts(args, plan, workspace);
  const cudaError_t status = launch_norm_parts(args, plan, parts, stream);
  if (status != cudaSuccess) return status;
  const bool global = is_global(args);
  return launch_tables(args.tensors, args.count, plan, [&](const auto& table) {
    constexpr int kTensors = std::decay_t<decltype(table)>::kTensors;
    if (global && table.first_tensor > 0) return cudaSuccess;  // one group, which the first launch has written
    return launch_perturbation(perturbation_combine<kTensors>, global ? 1 : table.count, BlockNorm::kBytes, stream,
                               table, args, parts);
  });
}

}  // namespace mmer
