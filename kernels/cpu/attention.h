// Attention on the CPU: tasks [begin, end) of a call, each some queries of one head of one sample.
#pragma once

#include "../common/attention_args.h"

namespace mmer {

// Queries of a task: as few as leave every thread something to do where there are few heads.
inline int64_t attention_cpu_task_queries(const AttentionForwardArgs& args) {
  const int64_t heads = args.batch * args.heads;
  return heads >= 32 || args.queries <= 192 ? (args.queries > 0 ? args.queries : 1) : 192;
}
inline int64_t attention_cpu_tasks(const AttentionForwardArgs& args) {
  const int64_t chunk = attention_cpu_task_queries(args);
  return args.batch * args.heads * ((args.queries + chunk - 1) / chunk);
}

// False: no memory for the scratch of a task.
bool attention_forward_cpu(const AttentionForwardArgs& args, int64_t begin, int64_t end);

}  // namespace mmer
