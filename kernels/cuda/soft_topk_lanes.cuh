// A group of kLanes lanes of one warp that share a short row, kept in registers.
//
// A warp holds 32 / kLanes rows, so that the solver's scalar work runs for all of them at once. Every shuffle is by
// the full warp: rows that are done keep taking part, and their results are ignored. Butterfly sums leave the same
// bits in all lanes of a group, so that all of them solve alike without a broadcast.
#pragma once

#include "soft_topk_row.cuh"

namespace mmer {

inline constexpr unsigned kFullWarp = 0xFFFFFFFFu;

template <int kLanes>
struct Lanes {
  template <typename T>
  static __device__ __forceinline__ T sum(T x) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
    return x;
  }

  template <typename T>
  static __device__ __forceinline__ T max(T x) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      const T other = __shfl_xor_sync(kFullWarp, x, offset);
      x = other > x ? other : x;
    }
    return x;
  }

  static __device__ __forceinline__ int count(int x) {
    if constexpr (kLanes == 32) {
      return static_cast<int>(__reduce_add_sync(kFullWarp, static_cast<unsigned>(x)));
    } else {
      return sum(x);
    }
  }
};

// Columns of a lane's registers: packs of consecutive entries where every matrix is aligned, else single entries. The
// choice is a template argument, so that all addresses are one base plus constants.
template <int kLanes, int kWidth, bool kVectorised>
struct LaneColumns {
  static constexpr bool kPacked = kVectorised;
  int lane;

  __device__ __forceinline__ int operator()(int pack, int j) const {
    return kVectorised ? (pack * kLanes + lane) * kWidth + j : (pack * kWidth + j) * kLanes + lane;
  }
};

// The first `limit` entries of a row into a lane's registers, 0 beyond.
template <int kLanes, int kPacks, typename Compute>
__device__ __forceinline__ void load_lane_values(const MatrixRow<Compute>& row, int limit, int lane, bool vectorised,
                                                 Compute* x) {
  constexpr int width = kVector<Compute>;
  const auto load_all = [&](const auto* data, auto columns) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      load_pack(data, limit, columns.kPacked, [&](int j) { return columns(pack, j); }, x + pack * width);
    }
  };
  row.typed([&](const auto* data) {
    if (vectorised) {
      load_all(data, LaneColumns<kLanes, width, true>{lane});
    } else {
      load_all(data, LaneColumns<kLanes, width, false>{lane});
    }
  });
}

// A lane's registers into the first `cols` entries of a row.
template <int kLanes, int kPacks, typename Compute>
__device__ __forceinline__ void store_lane_values(const MatrixRow<Compute>& row, int cols, int lane, bool vectorised,
                                                  const Compute* x) {
  constexpr int width = kVector<Compute>;
  const auto store_all = [&](auto* data, auto columns) {
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) {
      store_pack(data, cols, columns.kPacked, [&](int j) { return columns(pack, j); }, x + pack * width);
    }
  };
  row.typed([&](auto* data) {
    if (vectorised) {
      store_all(data, LaneColumns<kLanes, width, true>{lane});
    } else {
      store_all(data, LaneColumns<kLanes, width, false>{lane});
    }
  });
}

// The row's entries x = sign * s in registers; what takes no part is -inf.
template <typename Compute, int kLanes, int kItems>
struct LaneRow {
  using Group = Lanes<kLanes>;
  static constexpr int kWidth = kVector<Compute>;
  static constexpr int kPacks = kItems / kWidth;
  static_assert(kItems % kWidth == 0 && kItems <= 32, "whole packs, a bit an entry");

  Compute x[kItems];
  unsigned valid;  // bit i: x[i] is inside lengths and mask

  __device__ __forceinline__ void load(const Row<Compute>& row, int lane, bool vectorised) {
    load_lane_values<kLanes, kPacks>(row.scores, row.length, lane, vectorised, x);
    valid = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int pack = i / kWidth, j = i % kWidth;
      const int column = vectorised ? LaneColumns<kLanes, kWidth, true>{lane}(pack, j)
                                    : LaneColumns<kLanes, kWidth, false>{lane}(pack, j);
      const bool is_valid = row.valid(column);
      valid |= is_valid ? 1u << i : 0u;
      x[i] = row.ordered(x[i], is_valid);
    }
  }

  __device__ __forceinline__ RowStats stats() const {
    int finite = 0, poisoned = 0;
    Compute low = infinity<Compute>(), high = -infinity<Compute>(), total = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool is_finite = x[i] > -infinity<Compute>() && x[i] < infinity<Compute>();
      finite += is_finite;
      poisoned |= !(x[i] < infinity<Compute>());
      low = is_finite && x[i] < low ? x[i] : low;
      high = is_finite && x[i] > high ? x[i] : high;
      total += is_finite ? x[i] : Compute(0);
    }
    finite = Group::count(finite);
    const Compute entries = static_cast<Compute>(finite > 0 ? finite : 1);
    const Compute mean = Group::sum(total) / entries;
    Compute squares = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const Compute d = x[i] > -infinity<Compute>() ? x[i] - mean : Compute(0);
      squares = fma(d, d, squares);
    }
    RowStats stats;
    stats.valid = Group::count(__popc(valid));
    stats.finite = finite;
    stats.min = -Group::max(-low);
    stats.max = Group::max(high);
    stats.mean = mean;
    stats.var = Group::sum(squares) / entries;
    stats.poisoned = Group::max(poisoned) != 0;
    return stats;
  }

  __device__ __forceinline__ SigmoidSums sigmoids(const Argument<Compute>& argument) const {
    ThreadSums<Compute> part;
#pragma unroll
    for (int pack = 0; pack < kPacks; ++pack) part.add(argument, &x[pack * kWidth]);
    SigmoidSums sums;
    sums.upper = Group::count(part.upper);
    sums.d = Group::sum(part.d.total());
    sums.W = Group::sum(part.W);
    sums.wT = Group::sum(part.wT);
    sums.ww = Group::sum(part.ww);
    sums.active = Group::count(part.active);
    sums.outer_upper = Group::count(part.outer_upper);
    sums.outer_d = Group::sum(part.outer_d.total());
    return sums;
  }

  // The rank-th largest entry by bisection on the keys: value = max {v : #(x >= v) >= rank}. `wanted` must be the same
  // in all lanes of a group; the lanes of other groups only take part in the shuffles.
  __device__ __forceinline__ Selection select(int rank, const RowStats& stats, bool wanted) const {
    using Key = OrderedKey<Compute>;
    using Bits = typename Key::Bits;
    Bits low = wanted ? Key::encode(static_cast<Compute>(stats.min)) : 0;
    Bits high = wanted ? Key::encode(static_cast<Compute>(stats.max)) + 1 : 0;
    while (__any_sync(kFullWarp, high - low > 1)) {
      const Bits middle = low + (high - low) / 2;
      const Compute bound = Key::decode(middle);
      int count = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) count += x[i] >= bound;
      count = Group::count(count);
      if (high - low > 1) {
        if (count >= rank) {
          low = middle;
        } else {
          high = middle;
        }
      }
    }
    const Compute value = Key::decode(low);
    int above = 0, equal = 0;
    Compute below = -infinity<Compute>();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      above += x[i] > value;
      equal += x[i] == value;
      below = x[i] < value && x[i] > below ? x[i] : below;
    }
    Selection selection;
    selection.value = value;
    selection.above = Group::count(above);
    selection.equal = Group::count(equal);
    selection.below = Group::max(below);
    return selection;
  }
};

}  // namespace mmer
