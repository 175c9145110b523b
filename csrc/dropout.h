// What the bindings of dropout and of what is fused with it share.
#pragma once

#include "../kernels/cpu/dropout.h"
#include "tensor.h"

namespace mmer {

using MaybeTensor = std::optional<Tensor>;

// float64 where `tensor` is, else float32.
inline ScalarType wide_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline DropoutDraw draw_of(double p, const MaybeTensor& seed, const Tensor& x) {
  STD_TORCH_CHECK(p >= 0 && p < 1, "p must be within [0, 1), got ", p);
  STD_TORCH_CHECK(x.numel() < kMostDropoutElements, "x must have fewer than 2^35 elements, got ", x.numel());
  if (p == 0) return {0.0, nullptr};
  STD_TORCH_CHECK(
      seed.has_value() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long && seed->device() == x.device(),
      "seed must be an int64 tensor of one element on the device of x");
  return {p, static_cast<const int64_t*>(seed->data_ptr())};
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& x) {
  bool same = tensor.dim() == x.dim() && tensor.scalar_type() == x.scalar_type() && tensor.device() == x.device();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = tensor.size(d) == x.size(d);
  STD_TORCH_CHECK(same, name, " must have the shape, dtype and device of x");
}

// The size of the last dimension.
inline int64_t columns(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "x must have shape (..., D) with D >= 1");
  return x.size(x.dim() - 1);
}

// A contiguous (D,) of the wide type.
inline Tensor wide_row(const Tensor& tensor, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == columns(x) && tensor.scalar_type() == wide_type(x) &&
                      tensor.device() == x.device(),
                  name, " must have shape (D,) = (", columns(x), ",) and be float64 if x is, else float32");
  return torch::stable::contiguous(tensor);
}
inline MaybeTensor wide_row(const MaybeTensor& tensor, const char* name, const Tensor& x) {
  return tensor.has_value() ? MaybeTensor(wide_row(*tensor, name, x)) : std::nullopt;
}

inline const void* data_or_null(const MaybeTensor& tensor) { return tensor.has_value() ? tensor->data_ptr() : nullptr; }

// Sums over rows, a chunk of rows at a time, and then of the chunks in their order.
class RowSums {
 public:
  RowSums(const Tensor& x, int64_t rows, int64_t kinds)
      : x_(x), chunks_(sum_chunks(rows)), kinds_(kinds), parts_(empty(x, {chunks_, kinds, columns(x)}, wide_type(x))) {}

  int64_t chunks() const { return chunks_; }
  void* parts() const { return parts_.data_ptr(); }

  Tensor total(int64_t kind) const {
    Tensor out = empty(x_, {columns(x_)}, wide_type(x_));
    sum_of_chunks_cpu(dtype_of(x_, "x"), parts_.data_ptr(), chunks_, kinds_, columns(x_), kind, out.data_ptr());
    return out;
  }

 private:
  const Tensor& x_;
  const int64_t chunks_, kinds_;
  const Tensor parts_;
};

}  // namespace mmer
