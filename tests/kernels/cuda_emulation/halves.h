// Conversions of the half types, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

namespace emulation {

inline float half_to_float(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, power = bits >> 10 & 31u, fraction = bits & 1023u;
  if (power == 31) return same_bits<float>(sign | 0x7F800000u | fraction << 13);
  const float magnitude = power == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : same_bits<float>((power + 112) << 23 | fraction << 13);
  return sign != 0 ? -magnitude : magnitude;
}

inline uint32_t float_to_half(float x) {
  const uint32_t sign = same_bits<uint32_t>(x) >> 16 & 0x8000u;
  const float magnitude = std::fabs(x);
  if (x != x) return 0x7FFFu;
  if (magnitude >= 65520.0f) return sign | 0x7C00u;
  const int power = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const float units = std::nearbyint(std::ldexp(magnitude, 10 - power));  // of 2^(power - 10), at most 2048
  return sign | (static_cast<uint32_t>(power + 14) * 1024u + static_cast<uint32_t>(units));
}

inline uint32_t float_to_bfloat16(float x) {
  if (x != x) return 0x7FFFu;
  const uint32_t bits = same_bits<uint32_t>(x);
  return (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}

}  // namespace emulation
