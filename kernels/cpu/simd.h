// Vectors for the CPU kernels: GCC/Clang vector extensions, so that one source serves AVX-512, AVX2, the x86-64
// baseline and other architectures. Included by one translation unit per instruction set (see sources.json).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../common/host_device.h"

#define MMER_INLINE inline __attribute__((always_inline))

namespace mmer {
inline namespace MMER_VARIANT {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int kLanes = kVectorBytes / 4;
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
};

template <>
struct Simd<double> {
  static constexpr int kLanes = kVectorBytes / 8;
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using IntVec = typename Simd<T>::I;

template <class T>
MMER_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
MMER_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
MMER_INLINE Vec<T> broadcast(T x) {
  Vec<T> v;
  for (int i = 0; i < Simd<T>::kLanes; ++i) v[i] = x;
  return v;
}

MMER_INLINE double sum_lanes(Vec<float> v) {
#if defined(__AVX512F__)
  const __m512 x = (__m512)v;
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
#else
  double total = 0;
  for (int i = 0; i < Simd<float>::kLanes; ++i) total += v[i];
  return total;
#endif
}
MMER_INLINE double sum_lanes(Vec<double> v) {
  double total = 0;
  for (int i = 0; i < Simd<double>::kLanes; ++i) total += v[i];
  return total;
}

template <class T>
MMER_INLINE double max_lanes(Vec<T> v) {
  for (int width = Simd<T>::kLanes / 2; width > 0; width /= 2) {
    IntVec<T> other{};
    for (int i = 0; i < Simd<T>::kLanes; ++i) other[i] = i ^ width;
    const Vec<T> w = __builtin_shuffle(v, other);
    v = v > w ? v : w;
  }
  return v[0];
}

// 1/x to full precision.
MMER_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> r = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}
MMER_INLINE Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }

// v held within [-bound, bound].
template <class T>
MMER_INLINE Vec<T> clamp(Vec<T> v, T bound) {
  v = v < bound ? v : broadcast<T>(bound);
  return v > -bound ? v : broadcast<T>(-bound);
}

// 2^u, u held within +-110 (+-1000): room for a factor e^8 to either side.  u = n + g with |g| <= 1/2. Short dependency
// chains matter more than few operations here: Estrin's scheme, and a scale by 2^n off the polynomial's path. float:
// minimax polynomial of degree 6, relative error 1.7e-8; double: Taylor's of degree 13, below one ulp.
MMER_INLINE Vec<float> exp2_bounded(Vec<float> u) {
  using V = Vec<float>;
  u = clamp<float>(u, 110.0f);
  const V shifted = u + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, held in the low bits
  const V g = u - (shifted - 12582912.0f);
  const V g2 = g * g;
  const V low = 1.0f + g * 0.693147181f;
  const V middle = 0.240226464f + g * 0.0555032866f;
  const V high = (0.00961848884f + g * 0.00133999446f) + g2 * 0.000153458001f;
  const V p = low + g2 * (middle + g2 * high);
  return p * (V)(((IntVec<float>)shifted - 0x4B400000 + 127) << 23);
}

MMER_INLINE Vec<double> exp2_bounded(Vec<double> u) {
  using V = Vec<double>;
  u = clamp<double>(u, 1000.0);
  const V shifted = u + 6755399441055744.0;  // 1.5 * 2^52
  const V g = u - (shifted - 6755399441055744.0);
  const V g2 = g * g, g4 = g2 * g2;
  const V a = (1.0 + g * 0.6931471805599453) + g2 * (0.2402265069591007 + g * 0.055504108664821576);
  const V b =
      (0.009618129107628477 + g * 0.0013333558146428441) + g2 * (0.00015403530393381606 + g * 1.5252733804059838e-05);
  const V c =
      (1.3215486790144305e-06 + g * 1.0178086009239696e-07) + g2 * (7.054911620801121e-09 + g * 4.44553827187081e-10);
  const V e = 2.5678435993488196e-11 + g * 1.3691488853904124e-12;
  const V p = a + g4 * (b + g4 * (c + g4 * e));
  return p * (V)(((IntVec<double>)shifted - 0x4338000000000000 + 1023) << 52);
}

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

// Stores one vector of the compute type as the storage type.
MMER_INLINE void store_as(Vec<float> v, float* out) { store(out, v); }
MMER_INLINE void store_as(Vec<double> v, double* out) { store(out, v); }
template <class Storage>
MMER_INLINE void store_as(Vec<float> v, Storage* out) {
  float lanes[Simd<float>::kLanes];
  store(lanes, v);
  for (int j = 0; j < Simd<float>::kLanes; ++j) from_compute(lanes[j], out + j);
}

template <class Storage>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

}  // namespace MMER_VARIANT
}  // namespace mmer
