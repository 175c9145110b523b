// Dropout's draws: 16 bits of Philox4x32-7 an entry, a counter-based generator (Salmon et al. 2011, SC '11; seven
// rounds are the fewest that pass BigCrush):
//
//     mask = 1/(1 - q) where draw >= q 2^16, else 0;   q = p rounded to a multiple of 2^-16
//
// A counter gives eight draws: the halves of its four words, of each word the low one first. The draw of attention
// weight (b, h, i, j) is half j mod 8 of counter (j div 8, i, h, b) under the seed. Positions count within their own
// sample, so that padded and packed batches agree.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace mmer {
inline namespace MMER_VARIANT {

struct PhiloxWords {
  uint32_t w[4];
};

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;

MMER_HD PhiloxWords philox4x32(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.w[0], c1 = counter.w[1], c2 = counter.w[2], c3 = counter.w[3];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * kPhiloxMultiplier0;
    const uint64_t p1 = static_cast<uint64_t>(c2) * kPhiloxMultiplier1;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace MMER_VARIANT

// q 2^16
MMER_HD_MEMBER uint32_t dropped_of_65536(double p) {
  const double dropped = floor(p * 65536.0 + 0.5);
  return dropped < 65535.0 ? static_cast<uint32_t>(dropped) : 65535u;
}
// 1/(1 - q)
MMER_HD_MEMBER double dropout_scale(double p) { return 65536.0 / (65536.0 - dropped_of_65536(p)); }

}  // namespace mmer
