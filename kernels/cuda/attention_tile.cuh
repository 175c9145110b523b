// Tiles in shared memory and their products on tensor cores.
//
// A block has four warps, and a warp owns 16 rows of every product. The operands' rows lie in shared memory in chunks
// of 16 bytes, swizzled: a row's chunks are permuted so that the eight rows of one chunk that ldmatrix reads never
// share a bank. A step of depth is 32 bytes, whatever the type: 16 entries of bfloat16 or float16, 8 of float32.
//
// float32 is multiplied as three products of TF32 numbers, x = high + low with |low| <= 2^-11 |x|:
//
//     a b = high high + (high low + low high) + O(2^-22 |a b|)
//
// Tensor cores truncate their sums. So no float32 sum is left to them for longer than four steps: partial sums start
// from 0, the small products apart from the large ones, and are added by ordinary, rounding additions.
#pragma once

#include <cuda_runtime.h>

#include "../common/attention_args.h"
#include "attention_warp.cuh"

namespace mmer {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kWarpRows = 16;
inline constexpr int kBlockRows = kWarpRows * kWarps;  // rows that a block owns

// Blocks per multiprocessor that the registers are budgeted for.
template <class T, int kWidth>
inline constexpr int kBlocks = sizeof(T) == 2 && kWidth <= 64 ? 3 : 2;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / 32; }

template <class T>
inline constexpr int kDepth = 32 / static_cast<int>(sizeof(T));

// kRows rows of kWidth entries.
template <class T, int kRows, int kWidth>
struct Tile {
  static constexpr int kRowBytes = kWidth * static_cast<int>(sizeof(T));
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kBytes = kRows * kRowBytes;
  static constexpr int kSteps = kWidth / kDepth<T>;
  static constexpr uint32_t kSwizzled = (kChunks >= 8 ? 7u : 3u) << 4;  // bits of an address
  uint32_t base;                                                        // in shared memory, a multiple of kRowBytes

  __device__ __forceinline__ uint32_t chunk(int row, int index) const {
    const int swizzle = kChunks >= 8 ? row & 7 : (row >> 1) & 3;
    return base + static_cast<uint32_t>(row * kRowBytes + ((index ^ swizzle) << 4));
  }

  // `index` chunks on from a chunk whose index has none of its bits. Most of it is an offset known to the compiler.
  static __device__ __forceinline__ uint32_t along(uint32_t chunk, int index) {
    const uint32_t bits = static_cast<uint32_t>(index) << 4;
    return (chunk ^ (bits & kSwizzled)) + (bits & ~kSwizzled);
  }

  // Rows [row, row + 16) as the left operand, at a step of depth along the width.
  __device__ __forceinline__ void left(uint32_t (&r)[4], int row, int step) const {
    const int lane = lane_index();
    load_matrices(r, along(chunk(row + (lane & 15), lane >> 4), 2 * step));
  }

  // Rows [row, row + 16) as two columns of 8 of the right operand, at a step of depth along the width.
  __device__ __forceinline__ void right_transposed(uint32_t (&r)[4], int row, int step) const {
    const int lane = lane_index();
    const uint32_t first = chunk((lane & 7) + (lane >> 4 << 3), lane >> 3 & 1);
    load_matrices(r, along(first, 2 * step) + static_cast<uint32_t>(row * kRowBytes));
  }

  // Columns [16 pair, 16 pair + 16) as the right operand, at a step of depth along the rows. float32: rows 2t and
  // 2t + 1 where the tensor core has t and t + 4, in accordance with `accumulated_left`.
  __device__ __forceinline__ void right(uint32_t (&r)[4], int step, int pair) const {
    const int lane = lane_index();
    const uint32_t down = static_cast<uint32_t>(step * kDepth<T> * kRowBytes);
    if constexpr (sizeof(T) == 2) {
      load_matrices_transposed(r, along(chunk(lane & 15, lane >> 4), 2 * pair) + down);
    } else {
      const uint32_t word = static_cast<uint32_t>(lane >> 2 & 3) * 4;
      const uint32_t even = chunk(2 * (lane & 3), lane >> 4) + word, odd = chunk(2 * (lane & 3) + 1, lane >> 4) + word;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        r[2 * i] = load_word(along(even, 4 * pair + 2 * i) + down);
        r[2 * i + 1] = load_word(along(odd, 4 * pair + 2 * i) + down);
      }
    }
  }
};

// A sum as the left operand of the next product, at a step of depth along its columns.
template <class T, int kTiles>
__device__ __forceinline__ void accumulated_left(uint32_t (&r)[4], const float (&sum)[kTiles][4], int step) {
  if constexpr (sizeof(T) == 2) {
    const float (&first)[4] = sum[2 * step], (&second)[4] = sum[2 * step + 1];
    r[0] = pack(first[0], first[1], T{});
    r[1] = pack(first[2], first[3], T{});
    r[2] = pack(second[0], second[1], T{});
    r[3] = pack(second[2], second[3], T{});
  } else {
    r[0] = float_bits(sum[step][0]);
    r[1] = float_bits(sum[step][2]);
    r[2] = float_bits(sum[step][1]);
    r[3] = float_bits(sum[step][3]);
  }
}

// x to high + low, both TF32, rounded to nearest. A NaN is in `low` at least: there it has all bits but the sign, as
// GPUs make it, which rounded like a number would become -0.
__device__ __forceinline__ void split(uint32_t x, uint32_t& high, uint32_t& low) {
  high = (x + 0x1000u) & 0xFFFFE000u;
  const int rest = static_cast<int>(float_bits(bits_float(x) - bits_float(high)));
  low = (static_cast<uint32_t>(min(rest, 0x7FFFEFFF)) + 0x1000u) & 0xFFFFE000u;
}

template <class T, int kSteps, int kTiles, class Left, class Right>
__device__ __forceinline__ void multiply_narrow(float (&sum)[kTiles][4], Left left, Right right) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[4];
    left(a, step);
#pragma unroll
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      uint32_t b[4];
      right(b, step, pair);
      mma(sum[2 * pair], a, b[0], b[1], T{});
      mma(sum[2 * pair + 1], a, b[2], b[3], T{});
    }
  }
}

// By groups of steps, as many as there are registers for; kUnroll: 1, or kSteps where `left` is in registers itself.
template <int kSteps, int kGroup, int kUnroll, int kTiles, class Left, class Right>
__device__ __forceinline__ void multiply_float(float (&sum)[kTiles][4], int columns, Left left, Right right) {
  static_assert(kSteps % kGroup == 0, "whole groups");
#pragma unroll kUnroll
  for (int first = 0; first < kSteps; first += kGroup) {
    uint32_t high[kGroup][4], low[kGroup][4];
#pragma unroll
    for (int step = 0; step < kGroup; ++step) {
      uint32_t a[4];
      left(a, first + step);
#pragma unroll
      for (int i = 0; i < 4; ++i) split(a[i], high[step][i], low[step][i]);
    }
#pragma unroll
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      // By 32 columns. The branch also keeps the compiler from loading ahead more than the registers hold.
      if (pair / 2 * 32 >= columns) continue;
      float large[2][4] = {}, small[2][4] = {};
#pragma unroll
      for (int step = 0; step < kGroup; ++step) {
        uint32_t b[4], b_high[4], b_low[4];
        right(b, first + step, pair);
#pragma unroll
        for (int i = 0; i < 4; ++i) split(b[i], b_high[i], b_low[i]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_tf32(small[i], high[step], b_low[2 * i], b_low[2 * i + 1]);
          mma_tf32(small[i], low[step], b_high[2 * i], b_high[2 * i + 1]);
          mma_tf32(large[i], high[step], b_high[2 * i], b_high[2 * i + 1]);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[2 * pair + i / 4][i % 4] += large[i / 4][i % 4] + small[i / 4][i % 4];
    }
  }
}

// sum += left right over kSteps steps of depth: left(fragment, step), right(fragment, step, pair of column tiles).
// Columns behind the first `columns` are 0, and may be left out.
template <class T, int kSteps, int kUnroll, int kTiles, class Left, class Right>
__device__ __forceinline__ void multiply(float (&sum)[kTiles][4], int columns, Left left, Right right) {
  if constexpr (sizeof(T) == 2) {
    multiply_narrow<T, kSteps>(sum, left, right);
  } else {
    constexpr int kLongest = kUnroll == 1 ? 2 : (kTiles > 8 ? 1 : 4);
    multiply_float<kSteps, (kSteps < kLongest ? kSteps : kLongest), kUnroll>(sum, columns, left, right);
  }
}

// sum = a b^T: rows [row, row + 16) of a with all rows of b.
template <class T, int kRowsA, int kRowsB, int kWidth>
__device__ __forceinline__ void multiply_rows(float (&sum)[kRowsB / 8][4], Tile<T, kRowsA, kWidth> a, int row,
                                              Tile<T, kRowsB, kWidth> b) {
#pragma unroll
  for (int i = 0; i < kRowsB / 2; ++i) sum[i / 4][i % 4] = 0.0f;
  multiply<T, Tile<T, kRowsB, kWidth>::kSteps, 1>(
      sum, kRowsB, [&](uint32_t (&r)[4], int step) { a.left(r, row, step); },
      [&](uint32_t (&r)[4], int step, int pair) { b.right_transposed(r, 16 * pair, step); });
}

// sum += a b, where a is a sum whose columns are the rows of b, and b has no entries but 0 behind `width`.
template <class T, int kRows, int kWidth>
__device__ __forceinline__ void multiply_accumulated(float (&sum)[kWidth / 8][4], const float (&a)[kRows / 8][4],
                                                     Tile<T, kRows, kWidth> b, int width) {
  multiply<T, kRows / kDepth<T>, kRows / kDepth<T>>(
      sum, width, [&](uint32_t (&r)[4], int step) { accumulated_left<T>(r, a, step); },
      [&](uint32_t (&r)[4], int step, int pair) { b.right(r, step, pair); });
}

// The tokens of one sample and head.
template <class T>
struct TokenRows {
  const T* first;
  int64_t stride;
  int width;
  bool aligned;  // every row begins at a multiple of 16 bytes
};

template <class T>
__device__ __forceinline__ TokenRows<T> token_rows(const AttentionArray& array, int64_t b, int64_t h, int64_t first,
                                                   int64_t width, bool aligned) {
  return {array.at<T>(b, h, first), array.token, static_cast<int>(width), aligned};
}

// Rows [begin, begin + kRows) into the tile: 0 where not taken(row of the tile), and behind the width. Asynchronous
// where the rows are aligned; either way they are there after `copy_wait` and a barrier.
template <class T, int kRows, int kWidth, class Taken>
__device__ __forceinline__ void copy_rows(Tile<T, kRows, kWidth> tile, const TokenRows<T>& rows, int begin,
                                          Taken taken) {
  using Shape = Tile<T, kRows, kWidth>;
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T)), kStride = kThreads / Shape::kChunks;
  static_assert(kThreads % Shape::kChunks == 0 && kRows % kStride == 0, "a thread has the same chunk of every row");
  const int index = static_cast<int>(threadIdx.x) % Shape::kChunks,
            first = static_cast<int>(threadIdx.x) / Shape::kChunks;
  const int left = rows.width - index * kPerChunk, count = left < 0 ? 0 : (left > kPerChunk ? kPerChunk : left);
  const T* from = rows.first + (begin + first) * rows.stride + index * kPerChunk;
  if (rows.aligned) {
#pragma unroll
    for (int row = first; row < first + kRows; row += kStride, from += kStride * rows.stride) {
      const bool any = count > 0 && taken(row);
      copy_async(tile.chunk(row, index), any ? from : rows.first, any ? count * static_cast<int>(sizeof(T)) : 0);
    }
  } else {
#pragma unroll 1
    for (int row = first; row < first + kRows; row += kStride, from += kStride * rows.stride) {
      T* to = shared_pointer<T>(tile.chunk(row, index));
      const int here = taken(row) ? count : 0;
#pragma unroll 1
      for (int e = 0; e < kPerChunk; ++e) to[e] = e < here ? from[e] : T{};
    }
  }
}

// One row of a warp's sum, times factor, into a token, or 0 where it is not live; `half` chooses row g or g + 8.
template <class T, int kTiles>
__device__ __forceinline__ void store_row(T* token, int width, const float (&sum)[kTiles][4], int half, float factor,
                                          bool live) {
  const bool paired = width % 2 == 0 && reinterpret_cast<uintptr_t>(token) % (2 * sizeof(T)) == 0;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int column = 8 * n + 2 * (lane_index() & 3);
    const float x = live ? sum[n][2 * half] * factor : 0.0f, y = live ? sum[n][2 * half + 1] * factor : 0.0f;
    if (paired) {
      if (column < width) store_pair(token + column, x, y);
    } else {
      if (column < width) store(token + column, x);
      if (column + 1 < width) store(token + column + 1, y);
    }
  }
}

}  // namespace mmer
