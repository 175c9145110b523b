// Philox4x32-10, the counter-based generator that dropout draws from (Salmon et al. 2011, SC '11).
//
// Attention weight (b, h, i, j) is kept where word j mod 4 of counter (j div 4, i, h, b) under the seed is at least
// `dropout_threshold`. Positions count within their own sample, so that padded and packed batches agree.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mmer {
inline namespace MMER_VARIANT {

struct PhiloxWords {
  uint32_t w[4];
};

constexpr int kPhiloxRounds = 10;
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

// p 2^32, rounded down; p in [0, 1).
MMER_HD uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(p * 4294967296.0); }

}  // namespace MMER_VARIANT
}  // namespace mmer
