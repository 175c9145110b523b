// Attention on the CPU: tasks [begin, end) of a call. Which thread computes a task does not change its result.
#pragma once

#include "../common/attention_args.h"

namespace mmer {

// How a call is cut into tasks; by its shape alone, so that results do not depend on the number of threads.
struct AttentionTasks {
  int64_t query_chunk;       // queries of a forward task: one head of one sample, or a part where heads are few
  int64_t forward;           // tasks
  int64_t key_chunk;         // keys of a backward task: as above
  int64_t key_chunks;        // of a head; if more than 1, each has its own part of grad_q, to be summed
  int64_t backward;          // tasks
  int64_t bias_query_chunk;  // queries of a task of the bias gradient, which owns some rows of one of its matrices
  int64_t bias;              // tasks
};
AttentionTasks attention_cpu_tasks(const AttentionInputs& in);

// Where the tasks of a backward pass write what is summed afterwards; null where nothing is.
struct AttentionParts {
  float* grad_q = nullptr;   // [key_chunks, grad_q_elements]: the parts of a contiguous grad_q, of several chunks
  float* columns = nullptr;  // [batch, key_chunks, 3, heads, width]: grad_q, grad_k, grad_v summed over their tokens;
                             // only where each head has its own keys
};

// False: no memory for the scratch of a task.
bool attention_forward_cpu(const AttentionForwardArgs& args, int64_t begin, int64_t end);
bool attention_backward_cpu(const AttentionBackwardArgs& args, const AttentionParts& parts, int64_t begin, int64_t end);
bool attention_bias_backward_cpu(const AttentionBackwardArgs& args, int64_t begin, int64_t end);
// Rows [begin, end) of grad_q, as a contiguous array counts them: the sums of their parts.
bool attention_sum_parts_cpu(const AttentionBackwardArgs& args, const float* parts, int64_t begin, int64_t end);

}  // namespace mmer
