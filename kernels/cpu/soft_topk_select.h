// The score of a rank among a staged row: a start for the sigmoid sweeps where the row is a staircase at the scale of
// tau.
#pragma once

#include "soft_topk_rows.h"

namespace mmer {
inline namespace MMER_VARIANT {

// Order-preserving key of a score in float32.
inline uint32_t key_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline double value_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7FFFFFFFu : ~key;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The score of a rank (1 is the largest) by radix: three counting sweeps over 11, 11 and 10 bits of the key. float64
// scores are selected by their float32 rounding, which is monotone: a start for the sigmoid sweeps, not an answer.
template <class C>
Selection select(const C* x, int64_t length, int64_t rank) {
  constexpr int kShift[3] = {21, 10, 0};
  constexpr uint32_t kDigit[3] = {2047, 2047, 1023};
  uint32_t histogram[2048];
  uint32_t prefix = 0, below = 0;
  Selection selection;
  for (int pass = 0; pass < 3; ++pass) {
    std::memset(histogram, 0, sizeof histogram);
    const int shift = kShift[pass], outer_shift = pass == 0 ? 31 : kShift[pass - 1];
    for (int64_t i = 0; i < length; ++i) {
      const uint32_t key = key_of(static_cast<float>(x[i]));
      const bool inside = pass == 0 || (key >> outer_shift) == (prefix >> outer_shift);
      if (inside) {
        ++histogram[(key >> shift) & kDigit[pass]];
      } else if (pass == 2 && key < prefix && key > below) {
        below = key;
      }
    }
    uint32_t digit = kDigit[pass];
    while (digit > 0 && rank > histogram[digit]) {
      rank -= histogram[digit];
      selection.above += histogram[digit];
      --digit;
    }
    prefix |= digit << shift;
    if (pass < 2) continue;
    selection.value = value_of(prefix);
    selection.equal = histogram[digit];
    for (uint32_t d = digit; d-- > 0;) {
      if (histogram[d] > 0) {
        below = (prefix & ~kDigit[2]) | d;
        break;
      }
    }
    selection.below = below > key_of(-infinity<float>()) ? value_of(below) : -infinity<double>();
  }
  return selection;
}

}  // namespace MMER_VARIANT
}  // namespace mmer
