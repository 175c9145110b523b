// Dropout on attention weights, drawn again wherever it is needed (kernels/common/philox.h has the rule).
#pragma once

#include "attention_task.h"
#include "philox_groups.h"

namespace mmer {
inline namespace MMER_VARIANT {

class Dropout {
 public:
  static int64_t scratch(const AttentionInputs& in) {
    return in.dropout_p > 0 ? Arena::size(kMostWords) + 2 * Arena::size(kKeyBlock) : 0;
  }

  Dropout(const AttentionInputs& in, Arena& arena) : active_(in.dropout_p > 0) {
    if (!active_) return;
    words_ = reinterpret_cast<uint32_t*>(arena.take(kMostWords));
    groups_ = reinterpret_cast<uint32_t*>(arena.take(kKeyBlock));
    places_ = reinterpret_cast<int32_t*>(arena.take(kKeyBlock));
    dropped_ = static_cast<uint16_t>(dropped_of_65536(in.dropout_p));
    factor_ = static_cast<float>(dropout_scale(in.dropout_p));
    key_ = PhiloxKey(*in.seed);
  }

  // Draws for the queries [query, query + rows) and the gathered keys [start, start + count), at most a block of each;
  // nothing without dropout. Lanes run over the counters of one query after the other, so that short rows leave none
  // idle.
  void draw(int64_t b, int64_t h, int64_t query, int64_t rows, const GatheredKeys& keys, int64_t start, int64_t count) {
    if (!active_ || count == 0) return;
    find_groups(keys, start, count);
    count_ = count;
    uint32_t row = static_cast<uint32_t>(query);
    for (int64_t group = 0, drawn = 0; drawn < rows * groups_of_row_; drawn += kPhiloxGroups) {
      uint64_t c0[kPhiloxGroups], c1[kPhiloxGroups];
      for (int lane = 0; lane < kPhiloxGroups; ++lane) {
        c0[lane] = groups_[group];
        c1[lane] = row;
        if (++group == groups_of_row_) {
          group = 0;
          ++row;
        }
      }
      PhiloxPlaces places;
      std::memcpy(places.c0, c0, sizeof(c0));
      std::memcpy(places.c1, c1, sizeof(c1));
      philox_groups(places, static_cast<uint32_t>(h), static_cast<uint32_t>(b), key_, words_ + 4 * drawn);
    }
  }

  // Multiplies the entries of row i of those drawn by 0 or 1/(1 - q); nothing without dropout.
  void apply(int64_t i, float* __restrict__ row) const {
    if (!active_) return;
    const uint16_t* draws = reinterpret_cast<const uint16_t*>(words_) + kOfGroup * groups_of_row_ * i;
    const auto mask = [dropped = dropped_, factor = factor_](uint16_t draw)
                          MMER_INLINE_LAMBDA { return draw >= dropped ? factor : 0.0f; };
    if (adjacent_) {
      draws += places_[0];
      for (int64_t j = 0; j < count_; ++j) row[j] *= mask(draws[j]);
    } else {
      for (int64_t j = 0; j < count_; ++j) row[j] *= mask(draws[places_[j]]);
    }
  }

 private:
  static constexpr int64_t kOfGroup = 8;  // draws of a counter
  static constexpr int64_t kMostWords = 4 * (kQueryBlock * kKeyBlock + kPhiloxGroups);

  // The groups that the keys are in, and where in them the draw of each key is.
  void find_groups(const GatheredKeys& keys, int64_t start, int64_t count) {
    groups_of_row_ = 0;
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t index = static_cast<uint32_t>(keys.index(start + j)), group = index / kOfGroup;
      if (groups_of_row_ == 0 || groups_[groups_of_row_ - 1] != group) groups_[groups_of_row_++] = group;
      places_[j] = static_cast<int32_t>(kOfGroup * (groups_of_row_ - 1) + index % kOfGroup);
    }
    adjacent_ = keys.index(start + count - 1) - keys.index(start) == count - 1;
  }

  bool active_, adjacent_ = true;
  uint32_t *words_ = nullptr, *groups_ = nullptr;
  int32_t* places_ = nullptr;
  int64_t groups_of_row_ = 0, count_ = 0;
  uint16_t dropped_ = 0;
  PhiloxKey key_{0};
  float factor_ = 1;
};

}  // namespace MMER_VARIANT
}  // namespace mmer
