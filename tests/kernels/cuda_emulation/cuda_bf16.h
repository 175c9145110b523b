// In place of the toolkit's header.
#pragma once

#include "halves.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return emulation::same_bits<float>(static_cast<uint32_t>(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {static_cast<uint16_t>(emulation::float_to_bfloat16(x))}; }
