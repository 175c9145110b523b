// In place of the toolkit's header.
#pragma once

#include "halves.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) { return emulation::half_to_float(x.bits); }
inline __half __float2half_rn(float x) { return {static_cast<uint16_t>(emulation::float_to_half(x))}; }
