// The end of a perturbation:
//
//     w_i = stash_i (bits)
#include "perturbation_entries.cuh"

namespace mmer {
namespace {

template <int kCapacity>
__global__ void __launch_bounds__(kPerturbationThreads, kPerturbationBlocks)
    perturbation_restore(const __grid_constant__ PerturbationTable<kCapacity> table) {
  for (uint32_t c = blockIdx.x; c < table.chunks(); c += gridDim.x) {
    const DeviceChunk chunk = table.chunk(c);
    copy_chunk(chunk.weight, chunk.stash, chunk.count, chunk.weight_dtype);
  }
}

}  // namespace

cudaError_t perturbation_restore_cuda(const PerturbationTensor* tensors, int64_t count, cudaStream_t stream) {
  ChunkPlan plan{};
  if (!plan_chunks(tensors, count, plan)) return cudaErrorInvalidValue;
  return launch_tables(tensors, count, plan, [&](const auto& table) {
    constexpr int kTensors = std::decay_t<decltype(table)>::kTensors;
    if (table.chunks() == 0) return cudaSuccess;
    return launch_perturbation(perturbation_restore<kTensors>, table.chunks(), 0, stream, table);
  });
}

}  // namespace mmer
