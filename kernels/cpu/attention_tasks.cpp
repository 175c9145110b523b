#include "attention.h"

namespace mmer {
namespace {

constexpr int64_t kManyTasks = 32;  // enough for the threads of a call to share
constexpr int64_t kQueryChunk = 192;
constexpr int64_t kKeyUnit = 192;
constexpr int64_t kFewestKeys = 576;  // of a chunk: below, its copies of queries and gradients cost more than they save
constexpr int64_t kMostKeyChunks = 4;  // each takes as much memory as grad_q

int64_t parts_of(int64_t n, int64_t part) { return (n + part - 1) / part; }
int64_t at_least_1(int64_t n) { return n > 1 ? n : 1; }

}  // namespace

AttentionTasks attention_cpu_tasks(const AttentionInputs& in) {
  AttentionTasks tasks{};
  const int64_t heads = in.batch * in.heads, key_heads = in.batch * in.key_heads;
  tasks.query_chunk = heads >= kManyTasks || in.queries <= kQueryChunk ? at_least_1(in.queries) : kQueryChunk;
  tasks.forward = heads * parts_of(in.queries, tasks.query_chunk);

  int64_t chunks = key_heads > 0 ? parts_of(kManyTasks, key_heads) : 1;
  chunks = chunks < kMostKeyChunks ? chunks : kMostKeyChunks;
  chunks = chunks < in.keys / kFewestKeys ? chunks : in.keys / kFewestKeys;
  chunks = at_least_1(chunks);
  tasks.key_chunk = chunks == 1 ? at_least_1(in.keys) : parts_of(parts_of(in.keys, chunks), kKeyUnit) * kKeyUnit;
  tasks.key_chunks = at_least_1(parts_of(in.keys, tasks.key_chunk));
  tasks.backward = key_heads * tasks.key_chunks;

  if (in.bias != nullptr) {
    tasks.bias_query_chunk = in.bias_queries < kQueryChunk ? at_least_1(in.bias_queries) : kQueryChunk;
    tasks.bias = in.bias_batches * in.bias_heads * parts_of(in.bias_queries, tasks.bias_query_chunk);
  }
  return tasks;
}

}  // namespace mmer
