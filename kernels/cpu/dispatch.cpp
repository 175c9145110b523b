#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#include "attention.h"
#include "dropout.h"
#include "perturbation.h"
#include "soft_topk.h"

namespace mmer {

// Entry points of each build of the kernels; the namespace is the build's.
#define MMER_DECLARE_VARIANT(variant)                                                                                \
  namespace variant {                                                                                                \
  bool soft_topk_forward_rows(const SoftTopKForwardArgs& args, int64_t begin, int64_t end);                          \
  bool soft_topk_backward_rows(const SoftTopKBackwardArgs& args, int64_t begin, int64_t end);                        \
  bool attention_forward_tasks(const AttentionForwardArgs& args, int64_t begin, int64_t end);                        \
  bool attention_backward_tasks(const AttentionBackwardArgs& args, const AttentionParts& parts, int64_t begin,       \
                                int64_t end);                                                                        \
  bool attention_bias_backward_tasks(const AttentionBackwardArgs& args, int64_t begin, int64_t end);                 \
  bool attention_sum_parts_tasks(const AttentionBackwardArgs& args, const float* parts, int64_t begin, int64_t end); \
  void perturbation_norm_chunks(const PerturbationCpuArgs& call, int64_t begin, int64_t end);                        \
  void perturbation_apply_chunks(const PerturbationCpuArgs& call, int64_t begin, int64_t end);                       \
  void perturbation_restore_chunks(const PerturbationCpuArgs& call, int64_t begin, int64_t end);                     \
  bool dropout_elements(const DropoutArgs& args, int64_t begin, int64_t end);                                        \
  bool relu_dropout_rows(const ReluDropoutArgs& args, int64_t begin, int64_t end);                                   \
  void relu_dropout_backward_chunks(const ReluDropoutBackwardArgs& args, int64_t begin, int64_t end);                \
  bool dropout_norm_forward_rows(const DropoutNormForwardArgs& args, int64_t begin, int64_t end);                    \
  bool dropout_norm_backward_chunks(const DropoutNormBackwardArgs& args, int64_t begin, int64_t end);                \
  }

MMER_DECLARE_VARIANT(baseline)
#if defined(__x86_64__)
MMER_DECLARE_VARIANT(avx2)
MMER_DECLARE_VARIANT(avx512)
#endif

namespace {

Isa best_isa() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("MMER_FAST_CPU_ISA");
  if (wanted == nullptr) return best;
  Isa isa = best;
  if (std::strcmp(wanted, "baseline") == 0) isa = Isa::kBaseline;
  if (std::strcmp(wanted, "avx2") == 0) isa = Isa::kAvx2;
  return isa < best ? isa : best;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* cpu_isa_name() {
  switch (cpu_isa()) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "baseline";
  }
}

#if defined(__x86_64__)
#define MMER_DISPATCH(function, ...)                         \
  switch (cpu_isa()) {                                       \
    case Isa::kAvx512: return avx512::function(__VA_ARGS__); \
    case Isa::kAvx2: return avx2::function(__VA_ARGS__);     \
    default: return baseline::function(__VA_ARGS__);         \
  }
#else
#define MMER_DISPATCH(function, ...) return baseline::function(__VA_ARGS__)
#endif

bool soft_topk_forward_cpu(const SoftTopKForwardArgs& args, int64_t begin, int64_t end) {
  MMER_DISPATCH(soft_topk_forward_rows, args, begin, end);
}

bool soft_topk_backward_cpu(const SoftTopKBackwardArgs& args, int64_t begin, int64_t end) {
  MMER_DISPATCH(soft_topk_backward_rows, args, begin, end);
}

bool attention_forward_cpu(const AttentionForwardArgs& args, int64_t begin, int64_t end) {
  MMER_DISPATCH(attention_forward_tasks, args, begin, end);
}

bool attention_backward_cpu(const AttentionBackwardArgs& args, const AttentionParts& parts, int64_t begin,
                            int64_t end) {
  MMER_DISPATCH(attention_backward_tasks, args, parts, begin, end);
}

bool attention_bias_backward_cpu(const AttentionBackwardArgs& args, int64_t begin, int64_t end) {
  MMER_DISPATCH(attention_bias_backward_tasks, args, begin, end);
}

bool attention_sum_parts_cpu(const AttentionBackwardArgs& args, const float* parts, int64_t begin, int64_t end) {
  MMER_DISPATCH(attention_sum_parts_tasks, args, parts, begin, end);
}

void perturbation_norm_cpu(const PerturbationCpuArgs& call, int64_t begin, int64_t end) {
  MMER_DISPATCH(perturbation_norm_chunks, call, begin, end);
}

void perturbation_apply_cpu(const PerturbationCpuArgs& call, int64_t begin, int64_t end) {
  MMER_DISPATCH(perturbation_apply_chunks, call, begin, end);
}

void perturbation_restore_cpu(const PerturbationCpuArgs& call, int64_t begin, int64_t end) {
  MMER_DISPATCH(perturbation_restore_chunks, call, begin, end);
}

bool dropout_cpu(const DropoutArgs& args, int64_t begin, int64_t end) {
  MMER_DISPATCH(dropout_elements, args, begin, end);
}

bool relu_dropout_cpu(const ReluDropoutArgs& args, int64_t begin, int64_t end) {
  MMER_DISPATCH(relu_dropout_rows, args, begin, end);
}

void relu_dropout_backward_cpu(const ReluDropoutBackwardArgs& args, int64_t begin, int64_t end) {
  MMER_DISPATCH(relu_dropout_backward_chunks, args, begin, end);
}

bool dropout_norm_forward_cpu(const DropoutNormForwardArgs& args, int64_t begin, int64_t end) {
  MMER_DISPATCH(dropout_norm_forward_rows, args, begin, end);
}

bool dropout_norm_backward_cpu(const DropoutNormBackwardArgs& args, int64_t begin, int64_t end) {
  MMER_DISPATCH(dropout_norm_backward_chunks, args, begin, end);
}

}  // namespace mmer
