// The draws of dropout of elements in a row (kernels/common/dropout_args.h has the rule).
#pragma once

#include "../common/dropout_args.h"
#include "philox_groups.h"
#include "scratch.h"
#include "storage.h"

namespace mmer {
inline namespace MMER_VARIANT {

class DropoutDraws {
 public:
  // For up to `most` elements at once.
  DropoutDraws(const DropoutDraw& draw, int64_t most)
      : scratch_(draw.seed != nullptr ? (most + 2 * kElement + kBatch) / 2 : 1, 1),
        key_(draw.seed != nullptr ? *draw.seed : 0),
        dropped_(dropped_of_65536(draw.p)),
        scale_(dropout_scale(draw.p)) {}

  bool ok() const { return scratch_.ok(); }

  // Draws the numbers of elements [first, first + count).
  void draw(int64_t first, int64_t count) {
    uint32_t* words = reinterpret_cast<uint32_t*>(scratch_.buffer(0));
    const int64_t begin = first / kElement, end = (first + count + kElement - 1) / kElement;
    PhiloxPlaces places{};
    for (int u = 0; u < 2; ++u) {
      for (int lane = 0; lane < kPhiloxLanes; ++lane) {
        places.c0[u][lane] = static_cast<uint64_t>(begin + u * kPhiloxLanes + lane);
      }
    }
    for (int64_t group = begin; group < end; group += kPhiloxGroups) {
      philox_groups(places, 0, 0, key_, words + 4 * (group - begin));
      for (int u = 0; u < 2; ++u) places.c0[u] += kPhiloxGroups;
    }
    halves_ = reinterpret_cast<const uint16_t*>(words) + first % kElement;
  }

  // j -> the mask of element first + j.
  template <class C>
  auto mask() const {
    return [halves = halves_, dropped = dropped_, scale = static_cast<C>(scale_)](int64_t j)
               MMER_INLINE_LAMBDA { return halves[j] >= dropped ? scale : C(0); };
  }

 private:
  static constexpr int64_t kElement = 8;  // elements of a counter
  static constexpr int64_t kBatch = kElement * kPhiloxGroups;

  Scratch<float> scratch_;  // written as words, read as halves
  const uint16_t* halves_ = nullptr;
  PhiloxKey key_;
  uint16_t dropped_;
  double scale_;
};

}  // namespace MMER_VARIANT
}  // namespace mmer
