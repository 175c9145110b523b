// The blocks that share a long row: one block, or a thread-block cluster with distributed shared memory (sm_90+).
//
// Sums go warp -> block -> cluster, always in the same order, and end in warp 0 of every block. All blocks of a team
// see the same bits, so their warps 0 take the same decisions and need not exchange them.
#pragma once

#include <cooperative_groups.h>

#include "soft_topk_launch.cuh"
#include "soft_topk_math.cuh"

namespace mmer {

inline constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
inline constexpr int kMaxValues = 8;  // numbers that one reduction carries

struct TeamScratch {
  double warps[2][kLongWarps][kMaxValues];
  double block[2][kMaxValues];  // this block's totals, read by the other blocks
};

struct Sum {
  static __device__ __forceinline__ double identity() { return 0.0; }
  static __device__ __forceinline__ double apply(double a, double b) { return a + b; }
};

struct Max {
  static __device__ __forceinline__ double identity() { return -INFINITY; }
  static __device__ __forceinline__ double apply(double a, double b) { return b > a ? b : a; }
};

class Team {
 public:
  __device__ __forceinline__ Team(TeamScratch& scratch, int ranks) : scratch_(scratch), ranks_(ranks) {}

  __device__ __forceinline__ int ranks() const { return ranks_; }
  __device__ __forceinline__ int rank() const { return static_cast<int>(blockIdx.x) % ranks_; }
  __device__ __forceinline__ int warp() const { return static_cast<int>(threadIdx.x) / 32; }
  __device__ __forceinline__ int lane() const { return static_cast<int>(threadIdx.x) % 32; }

  // Every thread of every block arrives; what was written to shared memory before is seen by all of them after.
  __device__ __forceinline__ void sync() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (ranks_ > 1) {
      cooperative_groups::this_cluster().sync();
      return;
    }
#endif
    __syncthreads();
  }

  // A block may not exit while another can still read its shared memory.
  __device__ __forceinline__ void leave() const {
    if (ranks_ > 1) sync();
  }

  // `pointer` into this block's shared memory -> the same variable of block `rank` of the team.
  template <typename T>
  __device__ __forceinline__ const T* at_rank(T* pointer, int rank) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (ranks_ > 1) return cooperative_groups::this_cluster().map_shared_rank(pointer, rank);
#endif
    return pointer;
  }

  // Reduces values[0 .. sums) by Sum and the rest by Max. The totals are valid in warp 0 of every block, in all lanes.
  // Scratch alternates between two buffers: a buffer is written again only after the barrier of the next reduction,
  // which warp 0 reaches when it has read the totals of this one, from the other blocks too.
  template <int sums, int count>
  __device__ __forceinline__ void reduce(double (&values)[count]) {
    static_assert(count <= kMaxValues, "scratch is too small");
#pragma unroll
    for (int i = 0; i < count; ++i) {
      values[i] = i < sums ? butterfly<Sum, 32>(values[i]) : butterfly<Max, 32>(values[i]);
      if (lane() == 0) scratch_.warps[buffer_][warp()][i] = values[i];
    }
    __syncthreads();
    if (warp() == 0) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const double x = scratch_.warps[buffer_][lane() % kLongWarps][i];
        values[i] = i < sums ? butterfly<Sum, kLongWarps>(x) : butterfly<Max, kLongWarps>(x);
        if (ranks_ > 1 && lane() == 0) scratch_.block[buffer_][i] = values[i];
      }
    }
    if (ranks_ > 1) {
      sync();
      if (warp() == 0) {
        const int other = lane() % kMaxRanks;
        const double* totals = at_rank(scratch_.block[buffer_], other < ranks_ ? other : 0);
#pragma unroll
        for (int i = 0; i < count; ++i) {
          if (i < sums) {
            values[i] = butterfly<Sum, kMaxRanks>(other < ranks_ ? totals[i] : Sum::identity());
          } else {
            values[i] = butterfly<Max, kMaxRanks>(other < ranks_ ? totals[i] : Max::identity());
          }
        }
      }
    }
    buffer_ ^= 1;
  }

 private:
  // Leaves the same bits in all lanes of each group of `lanes`.
  template <typename Operation, int lanes>
  static __device__ __forceinline__ double butterfly(double x) {
#pragma unroll
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      x = Operation::apply(x, __shfl_xor_sync(kWholeWarp, x, offset));
    }
    return x;
  }

  TeamScratch& scratch_;
  int ranks_;
  int buffer_ = 0;
};

}  // namespace mmer
