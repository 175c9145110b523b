// The dtypes that the kernels know, as numbers that the bindings hand over.
#pragma once

namespace mmer {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

}  // namespace mmer
