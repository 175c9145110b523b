// The dtypes that the kernels know, as numbers that the bindings hand over.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mmer {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

MMER_HD_MEMBER int64_t entry_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : (dtype == DType::kFloat32 ? 4 : 2);
}

}  // namespace mmer
