// What the bindings of numpy_module.cpp share.
#pragma once

#include <stdexcept>
#include <string>

#include "common/dtype.h"

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

inline mmer::DType dtype_of(const std::string& name) {
  if (name == "float32") return mmer::DType::kFloat32;
  if (name == "float64") return mmer::DType::kFloat64;
  if (name == "bfloat16") return mmer::DType::kBFloat16;
  if (name == "float16") return mmer::DType::kFloat16;
  throw std::invalid_argument("dtype must be float32, float64, bfloat16 or float16, got " + name);
}
