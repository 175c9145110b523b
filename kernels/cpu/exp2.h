// 2^u of vectors.
#pragma once

#include "simd.h"

namespace mmer {
inline namespace MMER_VARIANT {

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
  for (int u = 0; u < kCount; ++u) a.v[u] = mark_nearest(a.v[u]);
  return a;
}
template <class T, int kCount>
MMER_INLINE Vec<T, kCount> marked(Vec<T, kCount> mark) {
  for (int u = 0; u < kCount; ++u) mark.v[u] = marked(mark.v[u]);
  return mark;
}
template <class T, int kCount>
MMER_INLINE Vec<T, kCount> times_power_of_2(Vec<T, kCount> p, Vec<T, kCount> mark) {
  for (int u = 0; u < kCount; ++u) p.v[u] = times_power_of_2(p.v[u], mark.v[u]);
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

}  // namespace MMER_VARIANT
}  // namespace mmer
