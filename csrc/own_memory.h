// Whether tensors that a call writes have memory of their own: no two share a byte, none has two entries in one place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "tensor.h"

namespace mmer {

class OwnMemory {
 public:
  void reserve(size_t tensors) { spans_.reserve(tensors); }

  // `tensor` lives until `check`; `list` and `index` say in errors which it is. dense: it fills its piece of memory.
  void add(const char* list, size_t index, const Tensor& tensor, bool dense, int64_t entry_bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    int64_t entries = tensor.numel();
    if (entries == 0) return;
    if (!dense) {
      STD_TORCH_CHECK(!is_expanded(tensor), list, "[", index, "] has several entries in one place");
      entries = entries_spanned(tensor);
    }
    spans_.push_back({begin, begin + static_cast<uintptr_t>(entries * entry_bytes), list, index, &tensor, entry_bytes});
  }

  void check() {
    const auto before = [](const Span& a, const Span& b) { return a.begin < b.begin; };
    if (!std::is_sorted(spans_.begin(), spans_.end(), before)) std::sort(spans_.begin(), spans_.end(), before);
    for (auto a = spans_.begin(); a != spans_.end(); ++a) {
      for (auto b = a + 1; b != spans_.end() && b->begin < a->end; ++b) {
        STD_TORCH_CHECK(!share_memory(*a, *b), a->list, "[", a->index, "] and ", b->list, "[", b->index,
                        "] share memory");
      }
    }
  }

 private:
  struct Span {  // of addresses
    uintptr_t begin, end;
    const char* list;
    size_t index;
    const Tensor* tensor;
    int64_t entry_bytes;
  };
  using Steps = std::map<int64_t, int64_t, std::greater<>>;  // strides in bytes, and how often each may be taken

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

  // Columns of one matrix lie between each other and share nothing. A byte of a tensor is its first one plus steps
  // along the strides, or its last one minus steps: a byte of both is there where steps of either add up to b's last -
  // a's first.
  static bool share_memory(const Span& a, const Span& b) {
    Steps steps;
    for (const Span* span : {&a, &b}) {
      steps[1] += span->entry_bytes - 1;
      for (int64_t d = 0; d < span->tensor->dim(); ++d) {
        const int64_t size = span->tensor->size(d);
        if (size > 1) steps[span->tensor->stride(d) * span->entry_bytes] += size - 1;
      }
    }
    return add_up(static_cast<int64_t>(b.end - 1 - a.begin), steps.begin(), steps.end());
  }

  // Whether steps from `first` on, the longest ones, add up to `total`.
  static bool add_up(int64_t total, Steps::const_iterator first, Steps::const_iterator end) {
    if (first == end) return total == 0;
    const auto [stride, most] = *first++;
    int64_t rest = 0;
    for (auto shorter = first; shorter != end; ++shorter) rest += shorter->first * shorter->second;
    const int64_t fewest = total > rest ? (total - rest + stride - 1) / stride : 0;
    for (int64_t n = fewest; n <= std::min(most, total / stride); ++n) {
      if (add_up(total - n * stride, first, end)) return true;
    }
    return false;
  }

  std::vector<Span> spans_;
};

}  // namespace mmer
