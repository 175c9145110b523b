// Philox4x32 of many counters at once (kernels/common/philox.h has the rule).
#pragma once

#include "../common/philox.h"
#include "simd.h"

namespace mmer {
inline namespace MMER_VARIANT {

struct PhiloxKey {
  explicit PhiloxKey(int64_t seed)
      : key0(static_cast<uint32_t>(seed)), key1(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)) {}
  uint32_t key0, key1;
};

constexpr int kPhiloxLanes = kVectorBytes / 8;
constexpr int kPhiloxGroups = 2 * kPhiloxLanes;  // two chains of dependent operations side by side

// The first two words of kPhiloxGroups counters, a lane each.
struct PhiloxPlaces {
  Words c0[2], c1[2];
};

// philox4x32 of the counters (c0, c1, c2, c3): four words of each. A lane holds a word in its lower half; what its
// upper half collects is dropped at the end.
inline void philox_groups(const PhiloxPlaces& places, uint32_t c2_of_all, uint32_t c3_of_all, PhiloxKey key,
                          uint32_t* out) {
  const Words zeros{}, lower = zeros + 0xFFFFFFFFull;
  Words c0[2], c1[2], c2[2], c3[2];
  for (int u = 0; u < 2; ++u) {
    c0[u] = places.c0[u];
    c1[u] = places.c1[u];
    c2[u] = zeros + c2_of_all;
    c3[u] = zeros + c3_of_all;
  }
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int u = 0; u < 2; ++u) {
      const Words p0 = multiply_lower(c0[u], zeros + kPhiloxMultiplier0);
      const Words p1 = multiply_lower(c2[u], zeros + kPhiloxMultiplier1);
      c0[u] = (p1 >> 32) ^ c1[u] ^ (zeros + key.key0);
      c2[u] = (p0 >> 32) ^ c3[u] ^ (zeros + key.key1);
      c1[u] = p1;
      c3[u] = p0;
    }
    key.key0 += kPhiloxKeyStep0;
    key.key1 += kPhiloxKeyStep1;
  }
  for (int u = 0; u < 2; ++u) {
    const Words early = (c0[u] & lower) | (c1[u] << 32), late = (c2[u] & lower) | (c3[u] << 32);
    for (int lane = 0; lane < kPhiloxLanes; ++lane) {
      const uint64_t pair[2] = {early[lane], late[lane]};
      std::memcpy(out + 4 * (u * kPhiloxLanes + lane), pair, sizeof(pair));
    }
  }
}

}  // namespace MMER_VARIANT
}  // namespace mmer
