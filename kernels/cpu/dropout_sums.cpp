#include "dropout.h"

namespace mmer {
namespace {

template <class C>
void sum_of_chunks(const C* sums, int64_t chunks, int64_t kinds, int64_t cols, int64_t kind, C* __restrict__ out) {
  for (int64_t j = 0; j < cols; ++j) out[j] = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const C* row = sums + (chunk * kinds + kind) * cols;
    for (int64_t j = 0; j < cols; ++j) out[j] += row[j];
  }
}

}  // namespace

void sum_of_chunks_cpu(DType dtype, const void* sums, int64_t chunks, int64_t kinds, int64_t cols, int64_t kind,
                       void* out) {
  if (dtype == DType::kFloat64) {
    sum_of_chunks(static_cast<const double*>(sums), chunks, kinds, cols, kind, static_cast<double*>(out));
  } else {
    sum_of_chunks(static_cast<const float*>(sums), chunks, kinds, cols, kind, static_cast<float*>(out));
  }
}

}  // namespace mmer
