// Whether tensors that a call writes have memory of their own: no two share any, none has several entries in one place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensor.h"

namespace mmer {

class OwnMemory {
 public:
  void reserve(size_t tensors) { spans_.reserve(tensors); }

  // `list` and `index` say in errors which tensor it is; dense: its entries fill a piece of memory.
  void add(const char* list, size_t index, const Tensor& tensor, bool dense, int64_t entry_bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    int64_t entries = tensor.numel();
    if (entries == 0) return;
    if (!dense) {
      STD_TORCH_CHECK(!is_expanded(tensor), list, "[", index, "] has several entries in one place");
      entries = entries_spanned(tensor);
    }
    spans_.push_back({begin, begin + static_cast<uintptr_t>(entries * entry_bytes), list, index});
  }

  void check() {
    const auto before = [](const Span& a, const Span& b) { return a.begin < b.begin; };
    if (!std::is_sorted(spans_.begin(), spans_.end(), before)) std::sort(spans_.begin(), spans_.end(), before);
    for (size_t i = 1; i < spans_.size(); ++i) {
      const Span &a = spans_[i - 1], &b = spans_[i];
      STD_TORCH_CHECK(a.end <= b.begin, a.list, "[", a.index, "] and ", b.list, "[", b.index, "] share memory");
    }
  }

 private:
  struct Span {  // of addresses
    uintptr_t begin, end;
    const char* list;
    size_t index;
  };

  static bool is_expanded(const Tensor& tensor) {
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      if (tensor.size(d) > 1 && tensor.stride(d) == 0) return true;
    }
    return false;
  }

  // From the first entry to the last.
  static int64_t entries_spanned(const Tensor& tensor) {
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    return last + 1;
  }

  std::vector<Span> spans_;
};

}  // namespace mmer
