// Dropout and what is fused with it on the CPU, in the instruction set chosen at run time (dispatch.h).
#pragma once

#include "../common/dropout_args.h"

namespace mmer {

// Sums over rows are taken in chunks of rows that depend on their number alone, and the sums of the chunks in their
// order: the threads do not change a bit.
constexpr int64_t kMostSumChunks = 32;
inline int64_t sum_chunk_rows(int64_t rows) {
  constexpr int64_t kFewest = 16;
  const int64_t even = (rows + kMostSumChunks - 1) / kMostSumChunks;
  return even > kFewest ? even : kFewest;
}
inline int64_t sum_chunks(int64_t rows) { return (rows + sum_chunk_rows(rows) - 1) / sum_chunk_rows(rows); }

// Rows that one task should take, so that a task is worth its start.
inline int64_t dropout_cpu_grain(int64_t cols) {
  constexpr int64_t kEntries = 8192;
  return cols >= kEntries ? 1 : kEntries / (cols > 0 ? cols : 1);
}

// Elements, rows or chunks of rows [begin, end). False: no memory for the scratch of a row, nothing written.
bool dropout_cpu(const DropoutArgs& args, int64_t begin, int64_t end);
bool relu_dropout_cpu(const ReluDropoutArgs& args, int64_t begin, int64_t end);
void relu_dropout_backward_cpu(const ReluDropoutBackwardArgs& args, int64_t begin, int64_t end);
bool dropout_norm_forward_cpu(const DropoutNormForwardArgs& args, int64_t begin, int64_t end);
bool dropout_norm_backward_cpu(const DropoutNormBackwardArgs& args, int64_t begin, int64_t end);

// out [D] = the sum over chunks of sums [chunks, kinds, D] at `kind`; wide.
void sum_of_chunks_cpu(DType dtype, const void* sums, int64_t chunks, int64_t kinds, int64_t cols, int64_t kind,
                       void* out);

}  // namespace mmer
