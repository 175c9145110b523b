// A step of half weights in float, wherever that surely gives the bits that the step in double gives.
//
//     x = w + F g     p = fl(f g),  r = fl(w + p),  f = fl(F)
//
// |r - x| <= 2^-24 (2 |p| + |r|), and what double gives, as a float, is within 2^-24 |x| of x. Where |w| <= 3 |r|, and
// so |p| <= 4 |r|, the two are less than 11 2^-24 |r| apart. They round to the same half unless a tie lies between
// them. Entries with a tie so near, one in 2000 (bfloat16) or 500 (float16), and those that are tiny, not finite, or
// mostly cancelled are left to double.
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

// |r|: what is less may have lost bits to float's own smallest numbers.
constexpr float kLeast = 0x1p-100f, kMost = 0x1p126f;

// bfloat16 drops the last 16 bits of a float: there are kMargin floats to the next tie. Units in the last place.
constexpr int32_t kTie = 0x8000, kMargin = 16;
// float16 drops 13, or more below 2^-14: numbers a little smaller and larger than r round alike.
constexpr float kSmaller = 1 - 0x1.8p-21f, kLarger = 1 + 0x1.8p-21f;

// rounded: the half next to each lane of r, and in which lanes (AVX2: whether in all) no tie is near. write_if_sure:
// whether double surely gives these halves, which are written then.
#if defined(__AVX512F__)
MMER_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
MMER_INLINE Floats load_floats(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
MMER_INLINE Floats load_floats(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MMER_INLINE __mmask16 rounded(const BFloat16*, Floats r, __m256i* halves) {
  const __m512i bits = _mm512_castps_si512(r);
  *halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(kTie)), 16));
  const __m512i beyond_tie = _mm512_add_epi32(bits, _mm512_set1_epi32(kTie + kMargin));
  return _mm512_test_epi32_mask(beyond_tie, _mm512_set1_epi32(2 * kTie - 2 * kMargin));
}
MMER_INLINE __mmask16 rounded(const Float16*, Floats r, __m256i* halves) {
  *halves = _mm512_cvtps_ph(r * kSmaller, _MM_FROUND_TO_NEAREST_INT);
  return _mm256_cmpeq_epi16_mask(*halves, _mm512_cvtps_ph(r * kLarger, _MM_FROUND_TO_NEAREST_INT));
}
template <class Half>
MMER_INLINE bool write_if_sure(Floats w, Floats r, Half* out) {
  __m256i halves;
  __mmask16 sure = rounded(out, r, &halves);
  const __m512 size = _mm512_abs_ps(r);
  sure = _mm512_mask_cmp_ps_mask(sure, size, _mm512_set1_ps(kLeast), _CMP_GE_OQ);
  sure = _mm512_mask_cmp_ps_mask(sure, size, _mm512_set1_ps(kMost), _CMP_LE_OQ);
  sure = _mm512_mask_cmp_ps_mask(sure, _mm512_abs_ps(w), size * 3.0f, _CMP_LE_OQ);
  if (sure != 0xFFFF) return false;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves);
  return true;
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
MMER_INLINE bool rounded(const BFloat16*, Floats r, __m128i* halves) {
  const FloatBits bits = (FloatBits)r;
  const __m256i wide = _mm256_srli_epi32((__m256i)(bits + kTie), 16);
  *halves = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  const FloatBits beyond_tie = (bits + (kTie + kMargin)) & (2 * kTie - 2 * kMargin);
  return _mm256_movemask_ps((__m256)(beyond_tie != 0)) == 0xFF;
}
MMER_INLINE bool rounded(const Float16*, Floats r, __m128i* halves) {
  *halves = _mm256_cvtps_ph(r * kSmaller, _MM_FROUND_TO_NEAREST_INT);
  const __m128i larger = _mm256_cvtps_ph(r * kLarger, _MM_FROUND_TO_NEAREST_INT);
  return _mm_movemask_epi8(_mm_cmpeq_epi16(*halves, larger)) == 0xFFFF;
}
template <class Half>
MMER_INLINE bool write_if_sure(Floats w, Floats r, Half* out) {
  constexpr int32_t kMagnitude = 0x7FFFFFFF;
  const Floats size = (Floats)((FloatBits)r & kMagnitude), before = (Floats)((FloatBits)w & kMagnitude);
  const FloatBits sure = (size >= kLeast) & (size <= kMost) & (before <= size * 3.0f);
  __m128i halves;
  if (!rounded(out, r, &halves) || _mm256_movemask_ps((__m256)sure) != 0xFF) return false;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), halves);
  return true;
}
#endif

// kFloats entries, w + f g; false where nothing is written, since only double is sure to be right.
template <class Half, class G>
MMER_INLINE bool half_step(Half* w, const G* g, float factor) {
  const Floats before = load_floats(w);
  return write_if_sure(before, before + load_floats(g) * factor, w);
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
