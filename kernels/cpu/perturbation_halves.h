// A step of half weights in float, wherever that surely gives the bits that the step in double gives.
//
//     x = w + F g     p = fl(f g),  r = fl(w + p),  f = fl(F)
//
// |r - x| <= 2^-24 (2 |p| + |r|), and what double gives, as a float, is within 2^-24 |x| of x: the two are less than
// d/2 apart, d = 2^-22 (|p| + |r|). Where r - d and r + d round to the same half, so does all between them. The others
// (where p is small, one entry in 10 000 in bfloat16, in 1500 in float16), and those that are tiny or not finite, are
// left to double.
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
constexpr float kDoubt = 0x1p-22f;
constexpr int32_t kTie = 0x8000;  // of the bits that bfloat16 drops: r - d and r + d are on the same side of it

// same_halves: the half next to r - d, and in which lanes (AVX2: whether in all) it is that of r + d.
#if defined(__AVX512F__)
MMER_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
MMER_INLINE Floats load_floats(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
MMER_INLINE Floats load_floats(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MMER_INLINE __mmask16 same_halves(const BFloat16*, Floats low, Floats high, __m256i* halves) {
  const __m512i tie = _mm512_set1_epi32(kTie);
  const __m512i a = _mm512_add_epi32(_mm512_castps_si512(low), tie),
                b = _mm512_add_epi32(_mm512_castps_si512(high), tie);
  *halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16));
  return _mm512_testn_epi32_mask(_mm512_xor_si512(a, b), _mm512_set1_epi32(-2 * kTie));
}
MMER_INLINE __mmask16 same_halves(const Float16*, Floats low, Floats high, __m256i* halves) {
  *halves = _mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT);
  return _mm256_cmpeq_epi16_mask(*halves, _mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
}
template <class Half>
MMER_INLINE bool write_if_sure(Floats p, Floats r, Half* out) {
  const Floats size = _mm512_abs_ps(r), doubt = (_mm512_abs_ps(p) + size) * kDoubt;
  __m256i halves;
  __mmask16 sure = same_halves(out, r - doubt, r + doubt, &halves);
  sure = _mm512_mask_cmp_ps_mask(sure, size, _mm512_set1_ps(kLeast), _CMP_GE_OQ);
  sure = _mm512_mask_cmp_ps_mask(sure, size, _mm512_set1_ps(kMost), _CMP_LE_OQ);
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
MMER_INLINE bool same_halves(const BFloat16*, Floats low, Floats high, __m128i* halves) {
  const FloatBits a = (FloatBits)low + kTie, b = (FloatBits)high + kTie;
  const __m256i wide = _mm256_srli_epi32((__m256i)a, 16);
  *halves = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  return _mm256_testz_si256((__m256i)(a ^ b), _mm256_set1_epi32(-2 * kTie));
}
MMER_INLINE bool same_halves(const Float16*, Floats low, Floats high, __m128i* halves) {
  *halves = _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT);
  const __m128i others = _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT);
  return _mm_movemask_epi8(_mm_cmpeq_epi16(*halves, others)) == 0xFFFF;
}
template <class Half>
MMER_INLINE bool write_if_sure(Floats p, Floats r, Half* out) {
  constexpr int32_t kMagnitude = 0x7FFFFFFF;
  const Floats size = (Floats)((FloatBits)r & kMagnitude), step = (Floats)((FloatBits)p & kMagnitude);
  const Floats doubt = (step + size) * kDoubt;
  const FloatBits in_range = (size >= kLeast) & (size <= kMost);
  __m128i halves;
  if (!same_halves(out, r - doubt, r + doubt, &halves) || _mm256_movemask_ps((__m256)in_range) != 0xFF) return false;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), halves);
  return true;
}
#endif

// kFloats entries, w + f g; false where nothing is written, since only double is sure to be right.
template <class Half, class G>
MMER_INLINE bool half_step(Half* w, const G* g, float factor) {
  const Floats p = load_floats(g) * factor;
  return write_if_sure(p, load_floats(w) + p, w);
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
