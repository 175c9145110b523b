// A step of half weights in float, wherever that surely gives the bits that the step in double gives.
//
//     x = w + F g     p = fl(f g),  r = fl(w + p),  f = fl(F)
//
// |r - x| <= 2^-24 (2 |p| + |r|), and what double gives, as a float, is within 2^-24 |x| of x. Where |w| <= 3 |r|, and
// so |p| <= 4 |r|, the two are less than 12 units in the last place of r apart. A half drops the last bits of a float,
// so it is the same half unless one of the floats that lie between is a tie of those bits. Such entries, one in 2000
// (bfloat16) or 250 (float16), and those that are tiny, not finite, or mostly cancelled are left to double.
#pragma once

#include "perturbation_blocks.h"

namespace mmer {
inline namespace MMER_VARIANT {

// Whether f is so far from the ends of float's range that neither it nor p loses bits that count.
MMER_INLINE bool floats_suffice(double factor) { return factor > 0x1p-100 && factor < 0x1p100; }

#if defined(__AVX2__) && defined(__F16C__)
constexpr bool kHasHalfSteps = true;
using Floats = Native<float>::V;
using FloatBits = Native<float>::I;
constexpr int kFloats = kVectorBytes / 4;

constexpr int32_t kMagnitude = 0x7FFFFFFF;
constexpr int32_t kMargin = 16;  // units in the last place

// The bits of a float that a half type drops, and below what size it drops more, or the bound does not hold.
template <class Half>
struct Dropped;
template <>
struct Dropped<BFloat16> {
  static constexpr int32_t kBits = 16;
  static constexpr float kLeast = 0x1p-100f;
};
template <>
struct Dropped<Float16> {
  static constexpr int32_t kBits = 13;
  static constexpr float kLeast = 0x1p-13f;  // subnormal below 2^-14
};
constexpr float kMost = 0x1p126f;

#if defined(__AVX512F__)
MMER_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
MMER_INLINE Floats load_floats(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
MMER_INLINE Floats load_floats(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Of numbers that are no ties.
MMER_INLINE void store_halves(Floats r, BFloat16* p) {
  const __m512i up = _mm512_add_epi32(_mm512_castps_si512(r), _mm512_set1_epi32(0x8000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
MMER_INLINE void store_halves(Floats r, Float16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT));
}
template <class Half>
MMER_INLINE bool surely_the_same(Floats w, Floats r) {
  constexpr int32_t kTie = 1 << (Dropped<Half>::kBits - 1);
  const __m512i bits = _mm512_castps_si512(r);
  const __m512i beyond_tie = _mm512_add_epi32(bits, _mm512_set1_epi32(kTie + kMargin));
  const __m512 size = _mm512_abs_ps(r);
  __mmask16 sure = _mm512_test_epi32_mask(beyond_tie, _mm512_set1_epi32(2 * kTie - 2 * kMargin));
  sure = _mm512_mask_cmp_ps_mask(sure, size, _mm512_set1_ps(Dropped<Half>::kLeast), _CMP_GE_OQ);
  sure = _mm512_mask_cmp_ps_mask(sure, size, _mm512_set1_ps(kMost), _CMP_LE_OQ);
  sure = _mm512_mask_cmp_ps_mask(sure, _mm512_abs_ps(w), size * 3.0f, _CMP_LE_OQ);
  return sure == 0xFFFF;
}
#else
MMER_INLINE Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
MMER_INLINE Floats load_floats(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
MMER_INLINE Floats load_floats(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MMER_INLINE void store_halves(Floats r, BFloat16* p) {
  const __m256i up = _mm256_add_epi32(_mm256_castps_si256(r), _mm256_set1_epi32(0x8000));
  const __m256i wide = _mm256_srli_epi32(up, 16);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}
MMER_INLINE void store_halves(Floats r, Float16* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT));
}
template <class Half>
MMER_INLINE bool surely_the_same(Floats w, Floats r) {
  constexpr int32_t kTie = 1 << (Dropped<Half>::kBits - 1);
  const FloatBits bits = (FloatBits)r;
  const FloatBits beyond_tie = (bits + (kTie + kMargin)) & (2 * kTie - 2 * kMargin);
  const Floats size = (Floats)(bits & kMagnitude), before = (Floats)((FloatBits)w & kMagnitude);
  const FloatBits sure =
      (beyond_tie != 0) & (size >= Dropped<Half>::kLeast) & (size <= kMost) & (before <= size * 3.0f);
  return _mm256_movemask_ps((__m256)sure) == 0xFF;
}
#endif

// kFloats entries, w + f g; false where nothing is written, since only double is sure to be right.
template <class Half, class G>
MMER_INLINE bool half_step(Half* w, const G* g, float factor) {
  const Floats before = load_floats(w);
  const Floats r = before + load_floats(g) * factor;
  if (!surely_the_same<Half>(before, r)) return false;
  store_halves(r, w);
  return true;
}
#else
constexpr bool kHasHalfSteps = false;
constexpr int kFloats = 2 * kWideLanes;
template <class Half, class G>
MMER_INLINE bool half_step(Half*, const G*, float) {
  return false;
}
#endif

}  // namespace MMER_VARIANT
}  // namespace mmer
