// The step, given the parts of the norms, or the norms:
//
//     stash_i = w_i (bits),   w_i <- w_i + (d_i prescale) scale,   prescale scale = factor of the group
//     d_i = g_i;   adaptive: d_i = w_i^2 g_i;   factor = radius / norm;   awp: radius |w|_2 / norm
//
// prescale is a power of two such that no product overflows or underflows (PerturbationStep). Where there is no step,
// because a norm is 0 or not finite, weights are not written.
#include "perturbation_sums.cuh"

namespace mmer {
namespace {

template <class Compute>
struct Factors {
  Compute prescale, scale;

  // g t prescale, for t >= 0. Its size is at most about 1, but g prescale alone may overflow where t is tiny or 0.
  __device__ __forceinline__ Compute product(Compute g, Compute t) const {
    const bool g_first = (fabs(g) < t) == (prescale >= 1);  // what is small grows first, what is large shrinks first
    return ((g_first ? g : t) * prescale) * (g_first ? t : g);
  }
};

// The step of a group, from thread 0 to all.
struct BlockStep {
  Factors<float> narrow;
  Factors<double> wide;
  bool moves;

  template <class Compute>
  __device__ __forceinline__ Factors<Compute> factors() const {
    if constexpr (sizeof(Compute) == 4) {
      return narrow;
    } else {
      return wide;
    }
  }
};

inline constexpr int kStepAddress = BlockNorm::kBytes;  // in shared memory
inline constexpr int kApplyBytes = kStepAddress + static_cast<int>(sizeof(BlockStep));
static_assert(kStepAddress % alignof(BlockStep) == 0, "");

__device__ __forceinline__ void write_group(const PerturbationArgs& args, int64_t group, const GroupNorms& norms,
                                            double factor) {
  args.norms[group] = norms.norm;
  if (args.weight_norms != nullptr && is_awp(args)) args.weight_norms[group] = norms.weight_norm;
  if (args.factors != nullptr) args.factors[group] = factor;
}

// All threads call it. writes: whether this block is the one to write the group's results.
template <int kCapacity>
__device__ __forceinline__ BlockStep group_step(const PerturbationTable<kCapacity>& table, int tensor,
                                                const PerturbationArgs& args, const NormParts& parts,
                                                BlockNorm& block_norm, bool writes) {
  BlockStep* shared = shared_pointer<BlockStep>(dynamic_shared() + kStepAddress);
  const GroupNorms norms = group_norms(table, tensor, args, parts, block_norm);
  __syncthreads();  // every thread has read the step before
  if (threadIdx.x == 0) {
    const double reach = args.radius * norms.weight_norm;
    const PerturbationStep narrow(norms.norm, reach, 126), wide(norms.norm, reach, 1020);
    const double scale = narrow.scale < FLT_MAX ? narrow.scale : FLT_MAX;  // infinity times 0 is no step
    shared->narrow = {static_cast<float>(narrow.prescale), static_cast<float>(scale)};
    shared->wide = {wide.prescale, wide.scale};
    shared->moves = wide.moves();
    const bool global = is_global(args);
    if (writes) write_group(args, global ? 0 : table.first_tensor + tensor, norms, wide.factor());
  }
  __syncthreads();
  return *shared;
}

template <class W, class G>
__device__ __forceinline__ void move_chunk(const DeviceChunk& chunk, const BlockStep& step, bool adaptive) {
  using Compute = ComputeType<W, G>;
  const Factors<Compute> factors = step.factors<Compute>();
  W *weight = static_cast<W*>(chunk.weight), *stash = static_cast<W*>(chunk.stash);
  const G* grad = static_cast<const G*>(chunk.grad);
  const bool vectors = aligned(weight) && aligned(stash), grad_vectors = aligned(grad);
  for_each_pass<kVectorWidth<W, G>, 2>(chunk.count, vectors, [&](const auto& place) {
    constexpr int kEntries = std::decay_t<decltype(place)>::kEntries;
    W w[kEntries];
    G g[kEntries];
    load_entries(weight, place, vectors, w);
    load_entries(grad, place, grad_vectors, g);
    store_entries(stash, place, w);
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const Compute x = to_compute_type<Compute>(w[i]), d = to_compute_type<Compute>(g[i]);
      if (adaptive) {
        // The step in units of |w| first: |w| may be subnormal, and a product with it loses digits before it is scaled.
        store_rounded(&w[i], x + factors.product(d, fabs(x)) * factors.scale * fabs(x));
      } else {
        store_rounded(&w[i], x + (d * factors.prescale) * factors.scale);
      }
    }
    store_entries(weight, place, w);
  });
}

template <int kCapacity>
__global__ void __launch_bounds__(kPerturbationThreads, kPerturbationBlocks)
    perturbation_apply(const __grid_constant__ PerturbationTable<kCapacity> table, const PerturbationArgs args,
                       const NormParts parts) {
  BlockNorm block_norm(dynamic_shared());
  const bool global = is_global(args);
  BlockStep step{};
  if (global) step = group_step(table, 0, args, parts, block_norm, blockIdx.x == 0 && table.first_tensor == 0);
  int tensor = -1;
  for (uint32_t c = blockIdx.x; c < table.chunks(); c += gridDim.x) {
    const DeviceChunk chunk = table.chunk(c);
    if (!global && chunk.tensor != tensor) {
      tensor = chunk.tensor;
      step = group_step(table, tensor, args, parts, block_norm, chunk.first);
    }
    if (!step.moves) {
      copy_chunk(chunk.stash, chunk.weight, chunk.count, chunk.weight_dtype);
      continue;
    }
    with_storage_type(chunk.weight_dtype, [&](auto weight_type) {
      with_storage_type(chunk.grad_dtype, [&](auto grad_type) {
        move_chunk<decltype(weight_type), decltype(grad_type)>(chunk, step, args.adaptive);
      });
    });
  }
}

}  // namespace

cudaError_t perturbation_apply_cuda(const PerturbationArgs& args, void* workspace, cudaStream_t stream) {
  ChunkPlan plan{};
  if (!plan_chunks(args.tensors, args.count, plan)) return cudaErrorInvalidValue;
  const bool given = args.given_norms != nullptr;
  if (given && is_awp(args) && args.given_weight_norms == nullptr) return cudaErrorInvalidValue;
  const NormParts parts = norm_parts(args, plan, workspace);
  const cudaError_t status = given ? cudaSuccess : launch_norm_parts(args, plan, parts, stream);
  if (status != cudaSuccess) return status;
  return launch_tables(args.tensors, args.count, plan, [&](const auto& table) {
    constexpr int kTensors = std::decay_t<decltype(table)>::kTensors;
    return launch_perturbation(perturbation_apply<kTensors>, table.chunks(), kApplyBytes, stream, table, args, parts);
  });
}

}  // namespace mmer
