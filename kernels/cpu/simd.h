// Vectors for the CPU kernels: GCC/Clang vector extensions, so that one source serves AVX-512, AVX2, the x86-64
// baseline and other architectures. Included by one translation unit per instruction set (see sources.json).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

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

#undef MMER_EACH

}  // namespace MMER_VARIANT
}  // namespace mmer
