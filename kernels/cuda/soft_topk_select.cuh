// The rank-th largest entry of a long row by radix: three counting sweeps over 11, 11 and 10 bits of the float key.
//
// Rows of doubles are ranked by their scores rounded to float, which keeps the order, and one more sweep finds a score
// in the float that was found: enough for the solver, which only starts from there.
#pragma once

#include "soft_topk_long_row.cuh"

namespace mmer {

inline constexpr int kRadixBits = 11;
inline constexpr int kBins = 1 << kRadixBits;
inline constexpr int kBinsPerThread = kBins / kLongThreads;

// Sweeps beyond the three that the solver counts.
template <typename Compute>
inline constexpr int kExtraSelectionSweeps = sizeof(Compute) == 8 ? 1 : 0;

struct Histogram {
  int bins[kBins];
  int warps[kLongWarps];
  int found_bin, found_above, found_equal;
};

// Counts this thread's bins over the whole team and marks, in `histogram`, the bin that holds the rank-th largest.
// All blocks of a team arrive at the same answer. Ends with a barrier of the block.
__device__ __forceinline__ void find_bin(const Team& team, Histogram& histogram, int rank,
                                         int (&counts)[kBinsPerThread]) {
  const int first = static_cast<int>(threadIdx.x) * kBinsPerThread;
  int total = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) counts[i] = 0;
  for (int other = 0; other < team.ranks(); ++other) {
    const int* bins = team.at_rank(histogram.bins, other) + first;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) counts[i] += bins[i];
  }
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) total += counts[i];

  int inclusive = total;  // entries in this thread's bins and in those of the higher lanes
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int higher = __shfl_down_sync(kWholeWarp, inclusive, distance);
    if (team.lane() + distance < 32) inclusive += higher;
  }
  if (team.lane() == 0) histogram.warps[team.warp()] = inclusive;
  __syncthreads();
  int above = inclusive - total;
#pragma unroll
  for (int warp = 0; warp < kLongWarps; ++warp) above += warp > team.warp() ? histogram.warps[warp] : 0;
#pragma unroll
  for (int i = kBinsPerThread - 1; i >= 0; --i) {
    if (above < rank && rank <= above + counts[i]) {  // true for one bin of one thread
      histogram.found_bin = first + i;
      histogram.found_above = above;
      histogram.found_equal = counts[i];
    }
    above += counts[i];
  }
  __syncthreads();
}

// The result is valid in warp 0 of every block. 1 <= rank <= number of finite entries.
template <typename Compute>
__device__ __forceinline__ Selection select_by_radix(const LongRow<Compute>& entries, Team& team, Histogram& histogram,
                                                     int rank) {
  using Key = OrderedKey<float>;
  uint32_t prefix = 0;      // the key's bits above `shift + bits`
  uint32_t next_lower = 0;  // largest key seen by this thread below the one that will be found; 0: none
  int remaining = rank;
  int equal = 0;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : (pass == 1 ? 10 : 0);
    const int bits = pass == 2 ? 10 : kRadixBits;
    for (int i = threadIdx.x; i < kBins; i += kLongThreads) histogram.bins[i] = 0;
    __syncthreads();
    entries.for_each_pack([&](int, const Compute* x) {
#pragma unroll
      for (int j = 0; j < kVector<Compute>; ++j) {
        if (!(x[j] > -infinity<Compute>())) continue;
        const uint32_t key = Key::encode(static_cast<float>(x[j]));
        const uint32_t head = pass == 0 ? 0u : key >> (shift + bits);  // a shift by 32 is undefined
        if (head == prefix) {
          atomicAdd(&histogram.bins[(key >> shift) & ((1u << bits) - 1u)], 1);
        } else if (pass == 2 && head < prefix && key > next_lower) {
          next_lower = key;
        }
      }
    });
    team.sync();  // all counts of the team are in
    int counts[kBinsPerThread];
    find_bin(team, histogram, remaining, counts);
    const int found = histogram.found_bin;
    remaining -= histogram.found_above;
    equal = histogram.found_equal;
    if (pass == 2) {
#pragma unroll
      for (int i = 0; i < kBinsPerThread; ++i) {
        const int bin = static_cast<int>(threadIdx.x) * kBinsPerThread + i;
        const uint32_t key = (prefix << bits) | static_cast<uint32_t>(bin);
        if (bin < found && counts[i] > 0 && key > next_lower) next_lower = key;
      }
    }
    prefix = (prefix << bits) | static_cast<uint32_t>(found);
    team.sync();  // all blocks have read the counts and the answer before the next pass clears them
  }

  Selection selection;
  selection.above = rank - remaining;
  selection.equal = equal;
  if constexpr (sizeof(Compute) == 4) {
    double values[] = {next_lower == 0 ? -INFINITY : static_cast<double>(Key::decode(next_lower))};
    team.reduce<0>(values);
    selection.value = Key::decode(prefix);
    selection.below = values[0];
  } else {
    Compute inside = -infinity<Compute>(), below = -infinity<Compute>();
    entries.for_each_pack([&](int, const Compute* x) {
#pragma unroll
      for (int j = 0; j < kVector<Compute>; ++j) {
        if (!(x[j] > -infinity<Compute>())) continue;
        const uint32_t key = Key::encode(static_cast<float>(x[j]));
        if (key == prefix && x[j] > inside) inside = x[j];
        if (key < prefix && x[j] > below) below = x[j];
      }
    });
    double values[] = {inside, below};
    team.reduce<0>(values);
    selection.value = values[0];
    selection.below = values[1];
  }
  return selection;
}

}  // namespace mmer
