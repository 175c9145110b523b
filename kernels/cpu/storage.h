// The types that entries are stored as, and those that they are computed in.
#pragma once

#include "../common/dtype.h"
#include "simd.h"

namespace mmer {
inline namespace MMER_VARIANT {

// Storage types: bits in, float out, and back with round-to-nearest-even.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MMER_INLINE float to_compute(float x) { return x; }
MMER_INLINE double to_compute(double x) { return x; }
MMER_INLINE float to_compute(BFloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}
MMER_INLINE float to_compute(Float16 x) {
  _Float16 half;
  std::memcpy(&half, &x, 2);
  return static_cast<float>(half);
}

MMER_INLINE void from_compute(float x, float* out) { *out = x; }
MMER_INLINE void from_compute(double x, double* out) { *out = x; }
MMER_INLINE void from_compute(float x, BFloat16* out) {
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  const uint32_t rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16;
  out->bits = x == x ? static_cast<uint16_t>(rounded) : static_cast<uint16_t>(0x7FC0);
}
MMER_INLINE void from_compute(float x, Float16* out) {
  const _Float16 half = static_cast<_Float16>(x);
  std::memcpy(out, &half, 2);
}

// Converts n entries; the loops vectorise (F16C on AVX2, AVX-512 conversions there).
template <class Storage, class Compute>
MMER_INLINE void convert_row(const Storage* in, int64_t n, Compute* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_compute(in[i]);
}
#if defined(__AVX512F__)
MMER_INLINE void convert_row(const Float16* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
  }
  for (; i < n; ++i) out[i] = to_compute(in[i]);
}
#endif

// Stores whole vectors of the compute type as the storage type.
MMER_INLINE void store_as(Vec<float> v, float* out) { store(out, v); }
MMER_INLINE void store_as(Vec<double> v, double* out) { store(out, v); }
template <class Storage>
MMER_INLINE void store_as(Vec<float> v, Storage* out) {
  float lanes[Vec<float>::kLanes];
  store(lanes, v);
  for (int j = 0; j < Vec<float>::kLanes; ++j) from_compute(lanes[j], out + j);
}

template <class Storage>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

// Calls `f` with a value of the type that a dtype is stored as: float, BFloat16 or Float16; or double too.
template <class F>
MMER_INLINE bool by_narrow_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kBFloat16: return f(BFloat16{});
    default: return f(Float16{});
  }
}
template <class F>
MMER_INLINE bool by_storage(DType dtype, F f) {
  return dtype == DType::kFloat64 ? f(double{}) : by_narrow_storage(dtype, f);
}

}  // namespace MMER_VARIANT
}  // namespace mmer
