// Soft top-k on the CPU: rows [begin, end) of a call, in the instruction set chosen at run time (dispatch.h).
#pragma once

#include "../common/soft_topk_args.h"

namespace mmer {

// False: no memory for the scratch of a row, nothing written.
bool soft_topk_forward_cpu(const SoftTopKForwardArgs& args, int64_t begin, int64_t end);
bool soft_topk_backward_cpu(const SoftTopKBackwardArgs& args, int64_t begin, int64_t end);

// Rows that one task should take, so that a task is worth its start.
inline int64_t soft_topk_cpu_grain(int64_t cols) {
  constexpr int64_t kEntries = 4096;
  return cols >= kEntries ? 1 : kEntries / (cols > 0 ? cols : 1);
}

}  // namespace mmer
