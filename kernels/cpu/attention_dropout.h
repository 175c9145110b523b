// Dropout on attention weights, drawn again wherever it is needed (kernels/common/philox.h has the rule).
#pragma once

#include "attention_task.h"
#include "philox_groups.h"

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
    key_ = PhiloxKey(*in.seed);
  }

  bool active() const { return active_; }

  // What the weights of the keys [start, start + count) are multiplied by, at most a block of them: 0 or 1/(1 - p).
  const float* factors(int64_t b, int64_t h, int64_t query, const GatheredKeys& keys, int64_t start, int64_t count) {
    if (count == 0) return factors_;
    const int64_t begin = keys.index(start), end = keys.index(start + count - 1), first = begin / 4;
    for (int64_t group = first; group <= end / 4; group += kPhiloxGroups) {
      const uint32_t counter[3] = {low(query), low(h), low(b)};
      philox_groups(group, counter, key_, words_ + 4 * (group - first));
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
  static uint32_t low(int64_t n) { return static_cast<uint32_t>(n); }
  static int64_t words(int64_t most) { return round_up(most, 4 * kPhiloxGroups) + 8 * kPhiloxGroups; }

  bool active_;
  uint32_t* words_ = nullptr;
  float* factors_ = nullptr;
  uint32_t threshold_ = 0;
  PhiloxKey key_{0};
  float factor_ = 1;
};

inline void multiply(const float* factors, int64_t count, float* row) {
  for (int64_t j = 0; j < count; ++j) row[j] *= factors[j];
}

}  // namespace MMER_VARIANT
}  // namespace mmer
