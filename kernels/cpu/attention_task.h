// What the attention tasks share: scratch, and the keys of a head that count, gathered.
#pragma once

#include <cmath>
#include <cstdlib>
#include <limits>

#include "attention.h"
#include "exp2.h"
#include "gemm.h"
#include "storage.h"

namespace mmer {
inline namespace MMER_VARIANT {

constexpr int64_t kQueryBlock = 48;
constexpr int64_t kKeyBlock = 192;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLog2 = 0.69314718055994530942f;

// In place of the standard library's templates: the linker keeps one instantiation of those for all variants, which
// might be that of an instruction set that the machine lacks.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t vectors_of(int64_t n) { return (n + kFloatLanes - 1) / kFloatLanes; }
// n up to the end of the last vector
inline int64_t padded(int64_t n) { return round_up(n, kFloatLanes); }
inline void zero(float* begin, int64_t count) {
  for (int64_t i = 0; i < count; ++i) begin[i] = 0;
}

// e^x; 0 below e^-69, 2^110 above, NaN stays NaN.
template <int kCount>
MMER_INLINE Vec<float, kCount> exp_or_zero(Vec<float, kCount> x) {
  const Vec<float, kCount> t = x * kLog2E;
  return select(t <= -100.0f, Vec<float, kCount>{}, exp2_bounded(t) + (t - t));
}

// A number of registers as a type.
template <int kCount_>
struct Registers {
  static constexpr int kCount = kCount_;
};

// body(Registers<>, j) for all vectors of a row of `count` entries, j the first of each: whole packs, and single
// registers for what is left of the last one.
template <class Body>
MMER_INLINE void for_vectors(int64_t count, Body body) {
  constexpr int64_t kPackLanes = Vec<float>::kLanes;
  int64_t j = 0;
  for (; j + kPackLanes <= count; j += kPackLanes) body(Registers<kPack>{}, j);
  for (; j < count; j += kFloatLanes) body(Registers<1>{}, j);
}

// One allocation for all arrays of a task, each on a cache line.
class Arena {
 public:
  explicit Arena(int64_t floats) : data_(static_cast<float*>(std::aligned_alloc(64, floats * 4))), next_(data_) {}
  ~Arena() { std::free(data_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  bool ok() const { return data_ != nullptr; }
  static int64_t size(int64_t floats) { return round_up(floats > 0 ? floats : 1, 16); }
  float* take(int64_t floats) {
    float* taken = next_;
    next_ += size(floats);
    return taken;
  }

 private:
  float *data_, *next_;
};

// How a faint weight, m < below, is taken apart: m = w 2^exponent; its power of two goes into the score and so into the
// running maximum, w stays a factor. So a query that sees faint keys alone has sums near 1, and e^(x - lse) in range.
struct FaintSplit {
  float below;
  int exponent;  // or 0: that which brings w to [1/2, 1)
};
// Sums keep what is far below the largest score but of much more weight.
constexpr FaintSplit kForwardSplit{0x1p-40f, 0};
// e^(x - lse) 2^-40 <= 2^110 for every m, and for dL/dm nothing is lost beside keys of ordinary weight.
constexpr FaintSplit kBackwardSplit{0x1p-100f, -40};

// The keys of one head that count, in their order: neither padding nor masked nor, unless they are asked for, of
// weight 0. Of all keys of a sample, or of a chunk of at most `most`.
class GatheredKeys {
 public:
  static int64_t room(int64_t most) { return round_up(most, kKeyBlock); }
  static int64_t scratch(int64_t most) { return 3 * Arena::size(room(most)); }

  GatheredKeys(const AttentionInputs& in, int64_t most, Arena& arena)
      : in_(in),
        room_(room(most)),
        weights_(arena.take(room_)),
        exponents_(arena.take(room_)),
        index_(reinterpret_cast<int32_t*>(arena.take(room_))) {}

  int64_t count() const { return count_; }
  int32_t index(int64_t j) const { return index_[j]; }
  // w, which is m where a key is not faint, up to the end of the last vector.
  const float* weights() const { return weights_; }
  // dL/dm of key j from dL/dw.
  float weight_gradient(int64_t j, float gradient) const {
    return faint_ ? std::ldexp(gradient, -static_cast<int>(exponents_[j])) : gradient;
  }

  void gather(int64_t b, int64_t h, int64_t begin, int64_t end, bool zero_weights, FaintSplit split) {
    const AttentionSpan span = in_.key_span(b);
    const bool weighted = in_.key_weights.data != nullptr;
    const uint8_t* mask = in_.mask != nullptr ? in_.mask + b * in_.mask_batch : nullptr;
    first_ = span.first;
    count_ = 0;
    faint_ = false;
    for (int64_t j = begin; j < least(end, span.count); ++j) {
      const float m = weighted ? *in_.key_weights.at(b, h, first_ + j) : 1.0f;
      if ((mask != nullptr && mask[j] == 0) || (m == 0 && !zero_weights)) continue;
      index_[count_] = static_cast<int32_t>(j);
      weights_[count_++] = m;
      faint_ |= m < split.below && m > 0;
    }
    zero(weights_ + count_, padded(count_) - count_);
    if (faint_) split_weights(split);
  }

  // Their entries, a column a key: [D, room], 0 up to the end of the last vector.
  template <class S>
  void columns(const AttentionArray& array, int64_t b, int64_t head, float* out) const {
    for (int64_t j = 0; j < count_; ++j) {
      const S* entry = array.at<S>(b, head, first_ + index_[j]);
      for (int64_t d = 0; d < in_.width; ++d) out[d * room_ + j] = to_compute(entry[d]);
    }
    for (int64_t d = 0; d < in_.width; ++d) zero(out + d * room_ + count_, padded(count_) - count_);
  }

  // Their entries, a row a key: [room, row] with zeros behind the width.
  template <class S>
  void rows(const AttentionArray& array, int64_t b, int64_t head, int64_t row, float* out) const {
    for (int64_t j = 0; j < count_; ++j) {
      load_row(array.at<S>(b, head, first_ + index_[j]), row, 1.0f, out + j * row);
    }
  }

  // An entry times `factor`, with zeros behind the width.
  template <class S>
  void load_row(const S* entry, int64_t row, float factor, float* out) const {
    for (int64_t d = 0; d < in_.width; ++d) out[d] = factor * to_compute(entry[d]);
    zero(out + in_.width, row - in_.width);
  }

  // Adds the bias, and what faint keys have in the exponent, to a row of scores of the keys [start, start + count), and
  // sets to -infinity what the query may not see, up to the end of the last vectors. Returns how many it sees.
  int64_t restrict_scores(int64_t b, int64_t h, int64_t query, int64_t start, int64_t count, float* x) const {
    if (in_.bias != nullptr) {
      const float* bias = in_.bias + b * in_.bias_batch + h * in_.bias_head + query * in_.bias_query;
      for (int64_t j = 0; j < count; ++j) x[j] += bias[index_[start + j] * in_.bias_key];
    }
    for (int64_t j = 0; faint_ && j < count; ++j) x[j] += kLog2 * exponents_[start + j];
    int64_t seen = count;
    while (in_.causal && seen > 0 && index_[start + seen - 1] > query) --seen;
    for (int64_t j = seen; j < padded(count); ++j) x[j] = -kInfinity;
    return seen;
  }

 private:
  void split_weights(FaintSplit split) {
    for (int64_t j = 0; j < count_; ++j) {
      float& w = weights_[j];
      int exponent = 0;
      if (w < split.below && w > 0) {
        exponent = split.exponent;
        w = exponent != 0 ? std::ldexp(w, -exponent) : std::frexp(w, &exponent);
      }
      exponents_[j] = static_cast<float>(exponent);
    }
  }

  const AttentionInputs& in_;
  const int64_t room_;
  float* weights_;
  float* exponents_;  // of powers of two beside weights_, where keys are faint
  bool faint_ = false;
  static_assert(kLongestSample <= std::numeric_limits<int32_t>::max(), "a key's number has 32 bits");
  int32_t* index_;
  int64_t first_ = 0, count_ = 0;
};

}  // namespace MMER_VARIANT
}  // namespace mmer
