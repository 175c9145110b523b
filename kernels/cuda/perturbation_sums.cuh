// Sums of squares that neither overflow nor underflow, over a thread's entries, a block and the parts of a norm.
//
// float64 is slow on most GPUs. So entries are squared in their own type, scaled by a power of two to at most 4, and
// float64 adds once for all entries that a thread loads together.
#pragma once

#include <cfloat>
#include <cstring>

#include "../common/perturbation_math.h"
#include "perturbation_entries.cuh"

namespace mmer {

// The exponents of a type that neither its ends nor their reciprocals leave.
template <class Compute>
inline constexpr int kExponents = sizeof(Compute) == 4 ? 126 : 1022;

// 2^exponent, within +-kExponents.
template <class Compute>
__device__ __forceinline__ Compute power_of_two(int exponent) {
  if constexpr (sizeof(Compute) == 4) {
    return bits_float(static_cast<uint32_t>(127 + exponent) << 23);
  } else {
    const uint64_t bits = static_cast<uint64_t>(1023 + exponent) << 52;
    Compute power;
    memcpy(&power, &bits, sizeof(power));
    return power;
  }
}

// For x >= 0: e such that x < 2^(e + 2), and 2^e <= x unless x is below the smallest normal number; within
// +-kExponents.
template <class Compute>
__device__ __forceinline__ int exponent_of(Compute x) {
  int exponent;
  if constexpr (sizeof(Compute) == 4) {
    exponent = static_cast<int>(float_bits(x) >> 23) - 127;
  } else {
    uint64_t bits;
    memcpy(&bits, &x, sizeof(bits));
    exponent = static_cast<int>(bits >> 52) - 1023;
  }
  return min(max(exponent, -kExponents<Compute>), kExponents<Compute>);
}

// sum 4^exponent
struct ScaledSum {
  static constexpr int kLowest = -8192;  // below the exponents of all parts

  double sum = 0;
  int exponent = kLowest;

  // 4^difference, for a difference of at most 0. What is smaller than this power can be adds nothing to a sum.
  static __device__ __forceinline__ double shift(int difference) {
    return power_of_two<double>(max(2 * difference, -1022));
  }

  __device__ __forceinline__ void add(double part, int part_exponent) {
    if (part_exponent > exponent) {
      sum *= shift(exponent - part_exponent);
      exponent = part_exponent;
    }
    sum += part * shift(part_exponent - exponent);
  }

  // x^2 of a part of a norm.
  __device__ __forceinline__ void add_square(double x) {
    const int e = exponent_of(x);
    const double scaled = x * power_of_two<double>(-e);
    add(scaled * scaled, e);
  }
};

// One thread's sum of squares of entries. Of floats, and of products of two, all squares fit a double.
template <class Compute>
struct EntrySum {
  ScaledSum total;

  __device__ __forceinline__ EntrySum() {
    if (sizeof(Compute) == 4) total.exponent = 0;
  }

  template <int n>
  static __device__ __forceinline__ Compute largest(const Compute (&x)[n]) {
    Compute result = 0;  // fmax passes over a NaN, which enters the sum all the same
#pragma unroll
    for (int i = 0; i < n; ++i) result = fmax(result, fabs(x[i]));
    return result;
  }

  // (x_i 2^exponent)^2
  template <int n>
  __device__ __forceinline__ void add(const Compute (&x)[n], Compute largest_x, int exponent = 0) {
    const int e = exponent_of(largest_x);
    const Compute scale = power_of_two<Compute>(-e);
    Compute even = 0, odd = 0;
#pragma unroll
    for (int i = 0; i < n; i += 2) {
      const Compute a = x[i] * scale, b = x[i + 1] * scale;
      even += a * a;
      odd += b * b;
    }
    if constexpr (sizeof(Compute) == 4) {
      total.sum += static_cast<double>(even + odd) * power_of_two<double>(2 * (exponent + e));
    } else {
      total.add(even + odd, exponent + e);
    }
  }

  // (w_i g_i)^2
  template <int n>
  __device__ __forceinline__ void add_products(const Compute (&w)[n], const Compute (&g)[n]) {
    const Compute largest_w = largest(w), largest_g = largest(g);
    const int w_exponent = exponent_of(largest_w), g_exponent = exponent_of(largest_g);
    const Compute w_scale = power_of_two<Compute>(-w_exponent), g_scale = power_of_two<Compute>(-g_exponent);
    Compute u[n];
#pragma unroll
    for (int i = 0; i < n; ++i) u[i] = (w[i] * w_scale) * (g[i] * g_scale);
    const Compute largest_u = largest(u);
    if constexpr (sizeof(Compute) == 4) {
      // Large weights at small gradients and the reverse: the products may have lost digits.
      if (largest_u < 0x1p-60f && largest_w > 0 && largest_g > 0) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const double exact = static_cast<double>(w[i]) * static_cast<double>(g[i]);
          total.sum += exact * exact;
        }
        return;
      }
    }
    add(u, largest_u, w_exponent + g_exponent);
  }
};

// Of x.
template <class T>
__device__ __forceinline__ ScaledSum sum_squares(const T* x, int count) {
  using Compute = ComputeType<T>;
  const bool vectors = aligned(x);
  EntrySum<Compute> sum;
  for_each_pass<kVectorWidth<T>, 2>(count, vectors, [&](const auto& place) {
    constexpr int kEntries = std::decay_t<decltype(place)>::kEntries;
    T stored[kEntries];
    Compute entries[kEntries];
    load_entries(x, place, vectors, stored);
#pragma unroll
    for (int i = 0; i < kEntries; ++i) entries[i] = to_compute_type<Compute>(stored[i]);
    sum.add(entries, sum.largest(entries));
  });
  return sum.total;
}

// Of w_i g_i.
template <class W, class G>
__device__ __forceinline__ ScaledSum sum_squared_products(const W* w, const G* g, int count) {
  using Compute = ComputeType<W, G>;
  constexpr int kWidth = kVectorWidth<W, G>;
  const bool vectors = aligned(w) && aligned(g);
  EntrySum<Compute> sum;
  for_each_pass<kWidth, kWidth == 8 ? 1 : 2>(count, vectors, [&](const auto& place) {
    constexpr int kEntries = std::decay_t<decltype(place)>::kEntries;
    W stored_w[kEntries];
    G stored_g[kEntries];
    Compute wide_w[kEntries], wide_g[kEntries];
    load_entries(w, place, vectors, stored_w);
    load_entries(g, place, vectors, stored_g);
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      wide_w[i] = to_compute_type<Compute>(stored_w[i]);
      wide_g[i] = to_compute_type<Compute>(stored_g[i]);
    }
    sum.add_products(wide_w, wide_g);
  });
  return sum.total;
}

// Turns the sums of a block's threads into a norm, in an order that is always the same.
class BlockNorm {
 public:
  static constexpr int kBytes = 2 * (kPerturbationThreads / 32) * static_cast<int>(sizeof(ScaledSum));

  __device__ __forceinline__ explicit BlockNorm(uint32_t shared) : shared_(shared) {}

  // sqrt of the threads' sums together, in warp 0; 0 in the others. Two buffers take turns: one is written again only
  // after the barrier of the next call, which warp 0 reaches when it has read the sums of this one.
  __device__ __forceinline__ double operator()(const ScaledSum& mine) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    ScaledSum* warps = shared_pointer<ScaledSum>(shared_) + buffer_ * kWarps;
    buffer_ ^= 1;
    const ScaledSum warp_sum = over_lanes<32>(mine);
    if (lane == 0) warps[warp] = warp_sum;
    __syncthreads();
    if (warp != 0) return 0;
    const ScaledSum sum = over_lanes<kWarps>(warps[lane % kWarps]);
    return ldexp(sqrt(sum.sum), sum.exponent);
  }

 private:
  static constexpr int kWarps = kPerturbationThreads / 32;

  // The same bits in all lanes of each group.
  template <int kLanes>
  static __device__ __forceinline__ ScaledSum over_lanes(const ScaledSum& mine) {
    ScaledSum result = mine;
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      result.exponent = max(result.exponent, __shfl_xor_sync(kAllLanes, result.exponent, distance));
    }
    result.sum *= ScaledSum::shift(mine.exponent - result.exponent);
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      result.sum += __shfl_xor_sync(kAllLanes, result.sum, distance);
    }
    return result;
  }

  uint32_t shared_;
  int buffer_ = 0;
};

// |(part_0, part_1, ...)|_2, in warp 0.
__device__ __forceinline__ double combine_parts(const double* parts, int64_t count, BlockNorm& block_norm) {
  ScaledSum sum;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < count; i += kPerturbationThreads) sum.add_square(parts[i]);
  return block_norm(sum);
}

struct GroupNorms {
  double norm, weight_norm;  // weight_norm: 1 unless scope awp
};

// Of all tensors, with scope global, or of one of the table; in warp 0. All threads call it.
template <int kCapacity>
__device__ __forceinline__ GroupNorms group_norms(const PerturbationTable<kCapacity>& table, int tensor,
                                                  const PerturbationArgs& args, const NormParts& parts,
                                                  BlockNorm& block_norm) {
  const bool global = is_global(args);
  if (args.given_norms != nullptr) {
    const int64_t group = global ? 0 : table.first_tensor + tensor;
    return {args.given_norms[group], is_awp(args) ? args.given_weight_norms[group] : 1.0};
  }
  const int64_t first = global ? 0 : table.first_chunk + table.first[tensor];
  const int64_t count = global ? parts.count : table.first[tensor + 1] - table.first[tensor];
  GroupNorms norms{combine_parts(parts.norms + first, count, block_norm), 1.0};
  if (is_awp(args)) norms.weight_norm = combine_parts(parts.weights + first, count, block_norm);
  return norms;
}

// The parts in a workspace.
inline NormParts norm_parts(const PerturbationArgs& args, const ChunkPlan& plan, void* workspace) {
  double* norms = static_cast<double*>(workspace);
  return {norms, is_awp(args) ? norms + plan.chunks : nullptr, plan.chunks};
}

// Writes the parts of norms.
cudaError_t launch_norm_parts(const PerturbationArgs& args, const ChunkPlan& plan, const NormParts& parts,
                              cudaStream_t stream);

}  // namespace mmer
