// Vectors for the CPU kernels: GCC/Clang vector extensions, so that one source serves AVX-512, AVX2, the x86-64
// baseline and other architectures. Included by one translation unit per instruction set (see sources.json).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../common/dtype.h"
#include "../common/host_device.h"

#define MMER_INLINE inline __attribute__((always_inline))
#define MMER_INLINE_LAMBDA __attribute__((always_inline))

namespace mmer {
inline namespace MMER_VARIANT {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kPack = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kPack = 2;
#else
constexpr int kVectorBytes = 16;
constexpr int kPack = 2;
#endif

// One register.
template <class T>
struct Native;
template <>
struct Native<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Native<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
};

// kCount registers that go through every operation side by side. A sweep is a long chain of dependent operations, and
// the scheduler of a core holds too few of them to find the next entries' chains by itself: hence kPack. Rows that end
// within a pack take single registers there.
template <class T, int kCount = kPack>
struct Vec {
  using V = typename Native<T>::V;
  static constexpr int kLanes = kCount * kVectorBytes / static_cast<int>(sizeof(T));
  V v[kCount];
};

template <class T, int kCount = kPack>
struct Mask {
  typename Native<T>::I m[kCount];
};

#define MMER_EACH for (int u = 0; u < kCount; ++u)

template <int kCount = kPack, class T>
MMER_INLINE Vec<T, kCount> load(const T* p) {
  Vec<T, kCount> a;
  MMER_EACH std::memcpy(&a.v[u], p + u * Vec<T, 1>::kLanes, kVectorBytes);
  return a;
}

template <class T, int kCount>
MMER_INLINE void store(T* p, Vec<T, kCount> a) {
  MMER_EACH std::memcpy(p + u * Vec<T, 1>::kLanes, &a.v[u], kVectorBytes);
}

template <class T, int kCount = kPack>
MMER_INLINE Vec<T, kCount> broadcast(T x) {
  Vec<T, kCount> a;
  MMER_EACH a.v[u] = x - typename Native<T>::V{};
  return a;
}

#define MMER_ARITHMETIC(op)                                                    \
  template <class T, int kCount>                                               \
  MMER_INLINE Vec<T, kCount> operator op(Vec<T, kCount> a, Vec<T, kCount> b) { \
    MMER_EACH a.v[u] = a.v[u] op b.v[u];                                       \
    return a;                                                                  \
  }                                                                            \
  template <class T, int kCount>                                               \
  MMER_INLINE Vec<T, kCount> operator op(Vec<T, kCount> a, T b) {              \
    MMER_EACH a.v[u] = a.v[u] op b;                                            \
    return a;                                                                  \
  }                                                                            \
  template <class T, int kCount>                                               \
  MMER_INLINE Vec<T, kCount> operator op(T a, Vec<T, kCount> b) {              \
    MMER_EACH b.v[u] = a op b.v[u];                                            \
    return b;                                                                  \
  }
MMER_ARITHMETIC(+)
MMER_ARITHMETIC(-)
MMER_ARITHMETIC(*)
#undef MMER_ARITHMETIC

template <class T, int kCount>
MMER_INLINE Vec<T, kCount> operator-(Vec<T, kCount> a) {
  MMER_EACH a.v[u] = -a.v[u];
  return a;
}

#define MMER_COMPARISON(op)                                        \
  template <class T, int kCount>                                   \
  MMER_INLINE Mask<T, kCount> operator op(Vec<T, kCount> a, T b) { \
    Mask<T, kCount> mask;                                          \
    MMER_EACH mask.m[u] = a.v[u] op b;                             \
    return mask;                                                   \
  }
MMER_COMPARISON(>)
MMER_COMPARISON(>=)
MMER_COMPARISON(<=)
#undef MMER_COMPARISON

template <class T, int kCount>
MMER_INLINE Mask<T, kCount> operator&(Mask<T, kCount> a, Mask<T, kCount> b) {
  MMER_EACH a.m[u] &= b.m[u];
  return a;
}

template <class T, int kCount>
MMER_INLINE Vec<T, kCount> select(Mask<T, kCount> mask, Vec<T, kCount> a, Vec<T, kCount> b) {
  MMER_EACH a.v[u] = mask.m[u] ? a.v[u] : b.v[u];
  return a;
}

// a where the mask is set, 0 elsewhere, whatever a is.
template <class T, int kCount>
MMER_INLINE Vec<T, kCount> where(Mask<T, kCount> mask, Vec<T, kCount> a) {
  return select(mask, a, Vec<T, kCount>{});
}

// The smaller and the larger of each pair of lanes; b where one of them is NaN.
template <class V>
MMER_INLINE V native_lesser(V a, V b) {
  return a < b ? a : b;
}
template <class V>
MMER_INLINE V native_greater(V a, V b) {
  return a > b ? a : b;
}
#if defined(__AVX512F__)
// The compiler makes a comparison and a blend of the generic ones.
MMER_INLINE Native<float>::V native_lesser(Native<float>::V a, Native<float>::V b) { return _mm512_min_ps(a, b); }
MMER_INLINE Native<float>::V native_greater(Native<float>::V a, Native<float>::V b) { return _mm512_max_ps(a, b); }
MMER_INLINE Native<double>::V native_lesser(Native<double>::V a, Native<double>::V b) { return _mm512_min_pd(a, b); }
MMER_INLINE Native<double>::V native_greater(Native<double>::V a, Native<double>::V b) { return _mm512_max_pd(a, b); }
#endif
template <class T, int kCount>
MMER_INLINE Vec<T, kCount> lesser(Vec<T, kCount> a, Vec<T, kCount> b) {
  MMER_EACH a.v[u] = native_lesser(a.v[u], b.v[u]);
  return a;
}
template <class T, int kCount>
MMER_INLINE Vec<T, kCount> greater(Vec<T, kCount> a, Vec<T, kCount> b) {
  MMER_EACH a.v[u] = native_greater(a.v[u], b.v[u]);
  return a;
}

// 1/x to full precision.
template <int kCount>
MMER_INLINE Vec<float, kCount> reciprocal(Vec<float, kCount> x) {
#if defined(__AVX512F__)
  Vec<float, kCount> r;
  MMER_EACH r.v[u] = _mm512_rcp14_ps(x.v[u]);
  return r * (2.0f - x * r);
#else
  MMER_EACH x.v[u] = 1.0f / x.v[u];
  return x;
#endif
}
template <int kCount>
MMER_INLINE Vec<double, kCount> reciprocal(Vec<double, kCount> x) {
  MMER_EACH x.v[u] = 1.0 / x.v[u];
  return x;
}

// The products of the lower 32 bits of 64-bit lanes.
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
MMER_INLINE Words multiply_lower(Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFull) * (b & 0xFFFFFFFFull);
#endif
}

// A running sum in one register, which leaves the others to the entries in flight.
template <class T>
struct Accumulator {
  using V = typename Native<T>::V;
  V sum{};
  template <int kCount>
  MMER_INLINE void add(Vec<T, kCount> a) {
    if constexpr (kCount == 4) {
      sum += (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]);
    } else if constexpr (kCount == 2) {
      sum += a.v[0] + a.v[1];
    } else {
      MMER_EACH sum += a.v[u];
    }
  }
  template <int kCount>
  MMER_INLINE void add_product(Vec<T, kCount> a, Vec<T, kCount> b) {
    MMER_EACH sum += a.v[u] * b.v[u];
  }
  template <int kCount>
  MMER_INLINE void count(Mask<T, kCount> mask) {
    MMER_EACH sum += mask.m[u] ? V{} + T(1) : V{};
  }
  double total() const;
};

template <class T>
inline double Accumulator<T>::total() const {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(sum));
    const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sum), 1)));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  } else {
    return _mm512_reduce_add_pd(sum);
  }
#else
  double total = 0;
  for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(T)); ++i) total += sum[i];
  return total;
#endif
}

template <class T, int kCount>
inline double max_lanes(Vec<T, kCount> a) {
  typename Native<T>::V best = a.v[0];
  for (int u = 1; u < kCount; ++u) best = native_greater(a.v[u], best);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_reduce_max_ps(best);
  } else {
    return _mm512_reduce_max_pd(best);
  }
#else
  T result = best[0];
  for (int i = 1; i < kVectorBytes / static_cast<int>(sizeof(T)); ++i) result = best[i] > result ? best[i] : result;
  return result;
#endif
}

// v held within [-bound, bound].
#if defined(__AVX512F__)
constexpr int kSmallerMagnitude = 2;  // with the sign of the first
MMER_INLINE Native<float>::V native_clamp(Native<float>::V v, float bound) {
  return _mm512_range_ps(v, _mm512_set1_ps(bound), kSmallerMagnitude);
}
MMER_INLINE Native<double>::V native_clamp(Native<double>::V v, double bound) {
  return _mm512_range_pd(v, _mm512_set1_pd(bound), kSmallerMagnitude);
}
#else
template <class V, class T>
MMER_INLINE V native_clamp(V v, T bound) {
  const V top = bound - V{};
  return native_greater(native_lesser(v, top), -top);
}
#endif
template <class T, int kCount>
MMER_INLINE Vec<T, kCount> clamp(Vec<T, kCount> v, T bound) {
  MMER_EACH v.v[u] = native_clamp(v.v[u], bound);
  return v;
}

// The integer n nearest to u, |u| < 2^20, in three steps: mark_nearest(u) is a number that stands for n, marked(mark)
// is n itself, times_power_of_2(p, mark) is p 2^n.
#if defined(__AVX512F__)
MMER_INLINE Native<float>::V mark_nearest(Native<float>::V u) { return _mm512_roundscale_ps(u, 0); }
MMER_INLINE Native<double>::V mark_nearest(Native<double>::V u) { return _mm512_roundscale_pd(u, 0); }
template <class V>
MMER_INLINE V marked(V mark) {
  return mark;
}
MMER_INLINE Native<float>::V times_power_of_2(Native<float>::V p, Native<float>::V mark) {
  return _mm512_scalef_ps(p, mark);
}
MMER_INLINE Native<double>::V times_power_of_2(Native<double>::V p, Native<double>::V mark) {
  return _mm512_scalef_pd(p, mark);
}
#else
constexpr float kRoundFloat = 12582912.0f;         // 1.5 * 2^23: a sum with it is an integer, held in its low bits
constexpr double kRoundDouble = 6755399441055744;  // 1.5 * 2^52
MMER_INLINE Native<float>::V mark_nearest(Native<float>::V u) { return u + kRoundFloat; }
MMER_INLINE Native<double>::V mark_nearest(Native<double>::V u) { return u + kRoundDouble; }
MMER_INLINE Native<float>::V marked(Native<float>::V mark) { return mark - kRoundFloat; }
MMER_INLINE Native<double>::V marked(Native<double>::V mark) { return mark - kRoundDouble; }
MMER_INLINE Native<float>::V times_power_of_2(Native<float>::V p, Native<float>::V mark) {
  return p * (Native<float>::V)(((Native<float>::I)mark - 0x4B400000 + 127) << 23);
}
MMER_INLINE Native<double>::V times_power_of_2(Native<double>::V p, Native<double>::V mark) {
  return p * (Native<double>::V)(((Native<double>::I)mark - 0x4338000000000000 + 1023) << 52);
}
#endif
template <class T, int kCount>
MMER_INLINE Vec<T, kCount> mark_nearest(Vec<T, kCount> a) {
  MMER_EACH a.v[u] = mark_nearest(a.v[u]);
  return a;
}
template <class T, int kCount>
MMER_INLINE Vec<T, kCount> marked(Vec<T, kCount> mark) {
  MMER_EACH mark.v[u] = marked(mark.v[u]);
  return mark;
}
template <class T, int kCount>
MMER_INLINE Vec<T, kCount> times_power_of_2(Vec<T, kCount> p, Vec<T, kCount> mark) {
  MMER_EACH p.v[u] = times_power_of_2(p.v[u], mark.v[u]);
  return p;
}

// 2^u, u held within +-110 (+-1000): room for a factor e^8 to either side.  u = n + g with |g| <= 1/2. Short dependency
// chains matter more than few operations here: Estrin's scheme, and a scale by 2^n off the polynomial's path. float:
// minimax polynomial of degree 6, relative error 1.7e-8; double: Taylor's of degree 13, below one ulp.
template <int kCount>
MMER_INLINE Vec<float, kCount> exp2_bounded(Vec<float, kCount> u) {
  using V = Vec<float, kCount>;
  u = clamp(u, 110.0f);
  const V mark = mark_nearest(u);
  const V g = u - marked(mark);
  const V g2 = g * g;
  const V low = 1.0f + g * 0.693147181f;
  const V middle = 0.240226464f + g * 0.0555032866f;
  const V high = (0.00961848884f + g * 0.00133999446f) + g2 * 0.000153458001f;
  return times_power_of_2(low + g2 * (middle + g2 * high), mark);
}

template <int kCount>
MMER_INLINE Vec<double, kCount> exp2_bounded(Vec<double, kCount> u) {
  using V = Vec<double, kCount>;
  u = clamp(u, 1000.0);
  const V mark = mark_nearest(u);
  const V g = u - marked(mark);
  const V g2 = g * g, g4 = g2 * g2;
  const V a = (1.0 + g * 0.6931471805599453) + g2 * (0.2402265069591007 + g * 0.055504108664821576);
  const V b =
      (0.009618129107628477 + g * 0.0013333558146428441) + g2 * (0.00015403530393381606 + g * 1.5252733804059838e-05);
  const V c =
      (1.3215486790144305e-06 + g * 1.0178086009239696e-07) + g2 * (7.054911620801121e-09 + g * 4.44553827187081e-10);
  const V e = 2.5678435993488196e-11 + g * 1.3691488853904124e-12;
  return times_power_of_2(a + g4 * (b + g4 * (c + g4 * e)), mark);
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

#undef MMER_EACH

}  // namespace MMER_VARIANT
}  // namespace mmer
