// Row-sized arrays of a task.
#pragma once

#include <cstdlib>

#include "simd.h"

namespace mmer {
inline namespace MMER_VARIANT {

template <class C>
inline int64_t whole_vectors(int64_t n) {
  return (n + Vec<C>::kLanes - 1) / Vec<C>::kLanes * Vec<C>::kLanes;
}

// Row-sized buffers of one task; whole vectors.
template <class C>
class Scratch {
 public:
  Scratch(int64_t cols, int buffers) : stride_(whole_vectors<C>(cols)) {
    const size_t bytes = static_cast<size_t>(stride_ * buffers) * sizeof(C);
    data_ = static_cast<C*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64));
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  bool ok() const { return data_ != nullptr; }
  C* buffer(int i) const { return data_ + i * stride_; }

 private:
  int64_t stride_;
  C* data_;
};

// A row [cols] of the caller's, or one of zeros where there is none.
template <class C>
class RowOrZeros {
 public:
  RowOrZeros(const void* row, int64_t cols) : zeros_(row == nullptr ? cols : 1, 1), row_(static_cast<const C*>(row)) {
    if (row_ != nullptr || !zeros_.ok()) return;
    for (int64_t j = 0; j < cols; ++j) zeros_.buffer(0)[j] = 0;
    row_ = zeros_.buffer(0);
  }
  bool ok() const { return zeros_.ok(); }
  const C* data() const { return row_; }

 private:
  Scratch<C> zeros_;
  const C* row_;
};

}  // namespace MMER_VARIANT
}  // namespace mmer
