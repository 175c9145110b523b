// Adversarial weight perturbation on the CPU: chunks [begin, end) of a call, in the instruction set chosen at run time.
#pragma once

#include "../common/perturbation_args.h"

namespace mmer {

// Entries [begin, end) of one tensor. Where chunks begin depends on sizes alone, so sums do not depend on the threads.
struct PerturbationChunk {
  int64_t tensor, begin, end;
};

constexpr int64_t kPerturbationChunk = 32768;  // entries; a multiple of what any vector holds

struct PerturbationCpuArgs {
  PerturbationArgs args;
  const PerturbationChunk* chunks;
  double* parts;         // |u|_2 of each chunk
  double* weight_parts;  // |w|_2 of each chunk; null unless awp
  bool streaming;        // write the copies around the caches: they are larger than those
};

// parts, weight_parts.
void perturbation_norm_cpu(const PerturbationCpuArgs& call, int64_t begin, int64_t end);
// stash = weight, then the step of args.norms and args.weight_norms.
void perturbation_apply_cpu(const PerturbationCpuArgs& call, int64_t begin, int64_t end);
// weight = stash.
void perturbation_restore_cpu(const PerturbationCpuArgs& call, int64_t begin, int64_t end);

}  // namespace mmer
