// A small matrix product for operands that stay in cache:   C (M, N) = A (M, K) B (K, N)   or   C += A B
//
// One register tile of C at a time: kTileRows rows of kTileVectors vectors, B read in vectors, A one entry a row. A may
// have any strides, so that a transposed A costs nothing. N is counted in whole vectors.
#pragma once

#include "simd.h"

namespace mmer {
inline namespace MMER_VARIANT {

constexpr int kFloatLanes = kVectorBytes / 4;
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileVectors = 3;  // 24 accumulators of 32 registers
#else
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 of 16
#endif

struct Gemm {
  int64_t k;
  const float* a;
  int64_t a_row, a_col;  // strides of A
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  bool accumulate;
};

template <int kRows, int kVectors>
MMER_INLINE void gemm_tile(const Gemm& g, int64_t row, int64_t col) {
  using V = Native<float>::V;
  const float *a = g.a + row * g.a_row, *b = g.b + col;
  float* c = g.c + row * g.c_row + col;
  V sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = V{};
      if (g.accumulate) std::memcpy(&sum[i][j], c + i * g.c_row + j * kFloatLanes, sizeof(V));
    }
  }
  for (int64_t k = 0; k < g.k; ++k) {
    V bk[kVectors];
    for (int j = 0; j < kVectors; ++j) std::memcpy(&bk[j], b + k * g.b_row + j * kFloatLanes, sizeof(V));
    for (int i = 0; i < kRows; ++i) {
      const float ak = a[i * g.a_row + k * g.a_col];
      for (int j = 0; j < kVectors; ++j) sum[i][j] += ak * bk[j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) std::memcpy(c + i * g.c_row + j * kFloatLanes, &sum[i][j], sizeof(V));
  }
}

template <int kVectors, int kRows = kTileRows>
void gemm_rows(const Gemm& g, int64_t row, int64_t rows, int64_t col) {
  if constexpr (kRows > 0) {
    for (; rows >= kRows; row += kRows, rows -= kRows) gemm_tile<kRows, kVectors>(g, row, col);
    if (rows > 0) gemm_rows<kVectors, kRows - 1>(g, row, rows, col);
  }
}

template <int kVectors = kTileVectors>
void gemm_columns(const Gemm& g, int64_t rows, int64_t col, int64_t vectors) {
  if constexpr (kVectors > 0) {
    for (; vectors >= kVectors; col += kVectors * kFloatLanes, vectors -= kVectors) {
      gemm_rows<kVectors>(g, 0, rows, col);
    }
    if (vectors > 0) gemm_columns<kVectors - 1>(g, rows, col, vectors);
  }
}

inline void gemm(const Gemm& g, int64_t rows, int64_t vectors) { gemm_columns(g, rows, 0, vectors); }

}  // namespace MMER_VARIANT
}  // namespace mmer
