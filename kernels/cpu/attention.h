// Attention on the CPU: tasks [begin, end) of a call, each some queries of one head of one sample.
#pragma once

#include "../common/attention_args.h"

namespace mmer {

// Queries of a forward task: as few as leave every thread something to do where there are few heads.
inline int64_t attention_cpu_task_queries(const AttentionInputs& in) {
  const int64_t heads = in.batch * in.heads;
  return heads >= 32 || in.queries <= 192 ? (in.queries > 0 ? in.queries : 1) : 192;
}
inline int64_t attention_cpu_forward_tasks(const AttentionInputs& in) {
  const int64_t chunk = attention_cpu_task_queries(in);
  return in.batch * in.heads * ((in.queries + chunk - 1) / chunk);
}
// A backward task owns the gradients of a head of keys, with all of its queries.
inline int64_t attention_cpu_backward_tasks(const AttentionInputs& in) { return in.batch * in.key_heads; }

// False: no memory for the scratch of a task.
bool attention_forward_cpu(const AttentionForwardArgs& args, int64_t begin, int64_t end);
bool attention_backward_cpu(const AttentionBackwardArgs& args, int64_t begin, int64_t end);

}  // namespace mmer
