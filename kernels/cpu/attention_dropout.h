// Dropout on attention weights, drawn again wherever it is needed (kernels/common/philox.h has the rule).
#pragma once

#include "../common/philox.h"
#include "attention_task.h"

namespace mmer {
inline namespace MMER_VARIANT {

class Dropout {
 public:
  static int64_t scratch(const AttentionInputs& in, int64_t most) {
    return in.dropout_p > 0 ? Arena::size(words(most)) + Arena::size(kKeyBlock) : 0;
  }

  Dropout(const AttentionInputs& in, int64_t most, Arena& arena) : active_(in.dropout_p > 0) {
    if (!active_) return;
    words_ = reinterpret_cast<uint32_t*>(arena.take(words(most)));
    factors_ = arena.take(kKeyBlock);
    threshold_ = dropout_threshold(in.dropout_p);
    factor_ = static_cast<float>(1 / (1 - in.dropout_p));
    const uint64_t seed = static_cast<uint64_t>(*in.seed);
    key0_ = static_cast<uint32_t>(seed);
    key1_ = static_cast<uint32_t>(seed >> 32);
  }

  bool active() const { return active_; }

  // What the weights of the keys [start, start + count) are multiplied by, at most a block of them: 0 or 1/(1 - p).
  const float* factors(int64_t b, int64_t h, int64_t query, const GatheredKeys& keys, int64_t start, int64_t count) {
    if (count == 0) return factors_;
    const int64_t begin = keys.index(start), end = keys.index(start + count - 1), first = begin / 4;
    for (int64_t group = first; group <= end / 4; group += kGroups) {
      draw(b, h, query, group, words_ + 4 * (group - first));
    }
    const uint32_t* words = words_ - 4 * first;
    if (end - begin == count - 1) {
      for (int64_t j = 0; j < count; ++j) factors_[j] = words[begin + j] >= threshold_ ? factor_ : 0.0f;
    } else {
      for (int64_t j = 0; j < count; ++j) factors_[j] = words[keys.index(start + j)] >= threshold_ ? factor_ : 0.0f;
    }
    return factors_;
  }

 private:
  static constexpr int kLanes = kVectorBytes / 8;
  static constexpr int kGroups = 2 * kLanes;  // two chains of dependent operations side by side
  static int64_t words(int64_t most) { return round_up(most, 4 * kGroups) + 8 * kGroups; }

  // philox4x32 of groups [group, group + kGroups), four words of each. A lane holds a word in its lower half; what its
  // upper half collects is dropped at the end.
  void draw(int64_t b, int64_t h, int64_t query, int64_t group, uint32_t* out) const {
    const Words zeros{}, lower = zeros + 0xFFFFFFFFull;
    Words c0[2], c1[2], c2[2], c3[2];
    for (int u = 0; u < 2; ++u) {
      for (int lane = 0; lane < kLanes; ++lane) c0[u][lane] = static_cast<uint64_t>(group + u * kLanes + lane);
      c1[u] = zeros + static_cast<uint64_t>(query);
      c2[u] = zeros + static_cast<uint64_t>(h);
      c3[u] = zeros + static_cast<uint64_t>(b);
    }
    uint32_t key0 = key0_, key1 = key1_;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int u = 0; u < 2; ++u) {
        const Words p0 = multiply_lower(c0[u], zeros + kPhiloxMultiplier0);
        const Words p1 = multiply_lower(c2[u], zeros + kPhiloxMultiplier1);
        c0[u] = (p1 >> 32) ^ c1[u] ^ (zeros + key0);
        c2[u] = (p0 >> 32) ^ c3[u] ^ (zeros + key1);
        c1[u] = p1;
        c3[u] = p0;
      }
      key0 += kPhiloxKeyStep0;
      key1 += kPhiloxKeyStep1;
    }
    for (int u = 0; u < 2; ++u) {
      const Words early = (c0[u] & lower) | (c1[u] << 32), late = (c2[u] & lower) | (c3[u] << 32);
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint64_t pair[2] = {early[lane], late[lane]};
        std::memcpy(out + 4 * (u * kLanes + lane), pair, sizeof(pair));
      }
    }
  }

  bool active_;
  uint32_t* words_ = nullptr;
  float* factors_ = nullptr;
  uint32_t threshold_ = 0, key0_ = 0, key1_ = 0;
  float factor_ = 1;
};

inline void multiply(const float* factors, int64_t count, float* row) {
  for (int64_t j = 0; j < count; ++j) row[j] *= factors[j];
}

}  // namespace MMER_VARIANT
}  // namespace mmer
