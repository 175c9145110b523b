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

// The float64 score of a rank, among the entries that round to `key` in float32. Each sweep halves their range, whose
// ends are entries: one sweep, where they are all equal.
inline double select_among(const double* x, int64_t length, uint32_t key, int64_t rank, int& sweeps) {
  double low = infinity<double>(), high = -low;
  for (int64_t i = 0; i < length; ++i) {
    if (key_of(static_cast<float>(x[i])) != key) continue;
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  for (++sweeps; low < high; ++sweeps) {
    const double half = low + (high - low) / 2, middle = half > low ? half : high;
    double above = high, below = low;  // the entries nearest to the middle
    int64_t count = 0;
    for (int64_t i = 0; i < length; ++i) {
      const bool upper = x[i] >= middle;
      count += upper;
      if (upper && x[i] < above) above = x[i];
      if (!upper && x[i] > below) below = x[i];
    }
    if (count >= rank) {
      low = above;
    } else {
      high = below;
    }
  }
  return low;
}

// What selection tells of `value`, by one sweep.
template <class C>
Selection selection_of(const C* x, int64_t length, C value) {
  Selection selection;
  C below = -infinity<C>();
  for (int64_t i = 0; i < length; ++i) {
    selection.above += x[i] > value;
    selection.equal += x[i] == value;
    if (x[i] < value && x[i] > below) below = x[i];
  }
  selection.value = value;
  selection.below = below;
  return selection;
}

// The score of a rank (1 is the largest) by radix: three counting sweeps over 11, 11 and 10 bits of the key. float64
// scores are selected by their float32 rounding, which is monotone; then, where tau is so small that it tells them
// apart, among those that share it. `sweeps` counts those beyond the three.
template <class C>
Selection select(const C* x, int64_t length, int64_t rank, double tau, int& sweeps) {
  constexpr int kShift[3] = {21, 10, 0};
  constexpr uint32_t kDigit[3] = {2047, 2047, 1023};
  static_assert(kLongestRow <= std::numeric_limits<uint32_t>::max(), "a count has 32 bits");
  uint32_t histogram[2048];
  uint32_t prefix = 0, below = 0;
  [[maybe_unused]] const int64_t rank_of_row = rank;
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
    if constexpr (sizeof(C) == 8) {
      constexpr double kRounding = 6e-8;  // of float32
      if (kRounding * std::fabs(value_of(prefix)) > tau) {
        const double value = select_among(x, length, prefix, rank_of_row, sweeps);
        ++sweeps;
        return selection_of(x, length, value);
      }
    }
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
