// A row of soft top-k in memory: staged into scratch of the compute type (float, or double for float64), -inf where an
// entry takes no part. Sweeps then run over whole vectors whatever the dtype, the mask and the length.
#pragma once

#include <cmath>
#include <limits>

#include "../common/soft_topk_args.h"
#include "../common/soft_topk_solver.h"
#include "scratch.h"
#include "storage.h"

namespace mmer {
inline namespace MMER_VARIANT {

template <class C>
constexpr C infinity() {
  return std::numeric_limits<C>::infinity();
}

inline int64_t row_length(const SoftTopKRows& in, int64_t row) {
  if (in.lengths == nullptr) return in.cols;
  const int64_t length = in.lengths[row];
  return length < 0 ? 0 : (length > in.cols ? in.cols : length);
}

// The entries of a row in the compute type, up to the end of the last vector: the array itself where that is what it
// holds, else a converted copy with `filler` behind the end.
template <class S, class C>
const C* stage(const S* in, int64_t length, C filler, bool copy, C* scratch) {
  const int64_t padded = whole_vectors<C>(length);
  if constexpr (sizeof(S) == sizeof(C)) {
    if (!copy && padded == length) return in;
  }
  convert_row(in, length, scratch);
  for (int64_t i = length; i < padded; ++i) scratch[i] = filler;
  return scratch;
}

template <class C>
struct StagedRow {
  const C* x;
  int64_t valid;  // entries inside lengths and mask
};

// x_i = sign s_i; -inf outside the mask and up to the end of the last vector.
template <class S, class C>
StagedRow<C> stage_scores(const SoftTopKRows& in, int64_t row, int64_t length, C* scratch) {
  const S* s = static_cast<const S*>(in.scores) + row * in.scores_stride;
  const C* x = stage<S, C>(s, length, -infinity<C>(), !in.largest || in.mask != nullptr, scratch);
  if (!in.largest) {
    for (int64_t i = 0; i < length; ++i) scratch[i] = -scratch[i];
  }
  if (in.mask == nullptr) return {x, length};
  const uint8_t* mask = in.mask + row * in.mask_stride;
  int64_t valid = 0;
  for (int64_t i = 0; i < length; ++i) {
    valid += mask[i] != 0;
    scratch[i] = mask[i] != 0 ? scratch[i] : -infinity<C>();
  }
  return {x, valid};
}

// dL/dT of the valid entries, 0 elsewhere.
template <class S, class C>
const C* stage_gradient(const SoftTopKBackwardArgs& args, int64_t row, int64_t length, C* scratch) {
  const S* grad = static_cast<const S*>(args.grad_weights) + row * args.grad_weights_stride;
  const C* g = stage<S, C>(grad, length, C(0), args.in.mask != nullptr, scratch);
  if (args.in.mask == nullptr) return g;
  const uint8_t* mask = args.in.mask + row * args.in.mask_stride;
  for (int64_t i = 0; i < length; ++i) scratch[i] = mask[i] != 0 ? scratch[i] : C(0);
  return g;
}

// Writes a row of whole vectors `entries(i)`, i = 0, lanes, ..., as far as the row goes.
template <class C, class S, class Entries>
MMER_INLINE void store_row(S* out, int64_t begin, int64_t end, int64_t length, Entries entries) {
  const int64_t whole = end <= length ? end : length / Vec<C>::kLanes * Vec<C>::kLanes;
  for (int64_t i = begin; i < whole; i += Vec<C>::kLanes) store_as(entries(i), out + i);
  if (whole < end) {
    C lanes[Vec<C>::kLanes];
    store(lanes, entries(whole));
    for (int64_t i = whole; i < length; ++i) from_compute(lanes[i - whole], out + i);
  }
}

template <class S>
void store_zeros(S* out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) from_compute(typename ComputeOf<S>::type(0), out + i);
}

// Of a row with infinities, NaN or a range that overflows.
template <class C>
RowStats irregular_row_stats(const C* x, int64_t length, int64_t valid) {
  RowStats stats;
  stats.valid = static_cast<double>(valid);
  stats.min = infinity<double>();
  stats.max = -infinity<double>();
  for (int64_t i = 0; i < length; ++i) {
    const double v = x[i];
    if (!(v < infinity<double>())) stats.poisoned = true;
    if (!(v > -infinity<double>())) continue;
    stats.finite += 1;
    const double shift = v - stats.mean;
    stats.mean += shift / stats.finite;
    stats.var += shift * (v - stats.mean);
    stats.min = v < stats.min ? v : stats.min;
    stats.max = v > stats.max ? v : stats.max;
  }
  if (stats.finite > 0) stats.var /= stats.finite;
  return stats;
}

// Mean and variance serve a first guess only: lane sums of the compute type, shifted by the first entry.
template <class C>
RowStats row_stats(const C* x, int64_t length, int64_t valid) {
  constexpr int kLanes = Vec<C>::kLanes;
  const C origin = length > 0 ? x[0] : C(0);
  Vec<C> low = broadcast<C>(origin), high = low;
  Accumulator<C> sum, square;
  const auto take = [&](Vec<C> v) MMER_INLINE_LAMBDA {
    const Vec<C> d = v - origin;
    sum.add(d);
    square.add_product(d, d);
    high = greater(v, high);
    low = lesser(v, low);
  };
  const int64_t whole = length / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) take(load(x + i));
  if (whole < length) {
    C rest[kLanes];
    for (int i = 0; i < kLanes; ++i) rest[i] = whole + i < length ? x[whole + i] : origin;
    take(load(rest));
  }
  const double total = sum.total(), squares = square.total();
  const double max = max_lanes(high), min = -max_lanes(-low);
  // A NaN or an infinity among the entries makes the total one.
  if (!std::isfinite(total)) return irregular_row_stats(x, length, valid);
  RowStats stats;
  stats.valid = stats.finite = static_cast<double>(valid);
  if (length > 0) {
    const double shift = total / length, var = squares / length - shift * shift;
    stats.min = min;
    stats.max = max;
    stats.mean = origin + shift;
    stats.var = var > 0 ? var : 0;
  }
  return stats;
}

}  // namespace MMER_VARIANT
}  // namespace mmer
