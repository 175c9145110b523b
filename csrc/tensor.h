// What the bindings share: checks, dtype mapping, new tensors. Stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "../kernels/common/dtype.h"

// The dispatcher's namespace of this build's operators, NAMESPACE in mmer_fast/ops/_library.py.
#ifndef MMER_NAMESPACE
#define MMER_NAMESPACE mmer_fast
#endif
#define MMER_IMPLEMENT(key, library) MMER_IMPLEMENT_IN(MMER_NAMESPACE, key, library)
#define MMER_IMPLEMENT_IN(space, key, library) STABLE_TORCH_LIBRARY_IMPL(space, key, library)

namespace mmer {

using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

inline Tensor unit_column_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) > 1 && tensor.stride(last) != 1 ? torch::stable::contiguous(tensor) : tensor;
}

// A (rows,) vector of `type`, contiguous, beside `like`.
template <class T>
const T* row_vector(const Tensor& tensor, const char* name, ScalarType type, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == like.size(0), name, " must have shape (rows,)");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " must be on the device of scores");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return static_cast<const T*>(tensor.data_ptr());
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// An uninitialised contiguous tensor on the device of `like`; unlike torch.empty, not by way of the dispatcher.
inline Tensor empty(const Tensor& like, const int64_t* shape, int64_t dims, ScalarType type) {
  constexpr int64_t kMostDims = 8;
  STD_TORCH_CHECK(dims <= kMostDims, "a tensor of more than ", kMostDims, " dimensions");
  int64_t strides[kMostDims];
  int64_t stride = 1;
  for (int64_t i = dims; i-- > 0; stride *= shape[i] > 0 ? shape[i] : 1) strides[i] = stride;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device_type = 0;
  AtenTensorHandle handle = nullptr;
  const bool ok = aoti_torch_get_device_type(like.get(), &device_type) == AOTI_TORCH_SUCCESS &&
                  aoti_torch_empty_strided(dims, shape, strides, dtype, device_type, like.get_device_index(),
                                           &handle) == AOTI_TORCH_SUCCESS;
  STD_TORCH_CHECK(ok, "no memory for a tensor of ", dims > 0 ? shape[0] : 1, " rows");
  return Tensor(handle);
}

template <size_t N>
Tensor empty(const Tensor& like, const int64_t (&shape)[N], ScalarType type) {
  return empty(like, shape, static_cast<int64_t>(N), type);
}

// The same with the shape of `like`, or of its first `dims` dimensions.
inline Tensor contiguous_like(const Tensor& like, ScalarType type, int64_t dims) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < dims; ++i) shape.push_back(like.size(i));
  return empty(like, shape.data(), dims, type);
}
inline Tensor contiguous_like(const Tensor& like) { return contiguous_like(like, like.scalar_type(), like.dim()); }

}  // namespace mmer
