// Adversarial weight perturbation, a chunk of a tensor at a time:
//
//     plain      u_i = g_i         d_i = g_i             part = |u|_2 of the chunk
//     adaptive   u_i = |w_i| g_i   d_i = w_i^2 g_i
//
//     stash_i = w_i (bits),   w_i <- w_i + (d_i prescale) scale
//
// Memory is read and written once and little else costs: all arithmetic is in double, whatever the dtypes.
#include "perturbation.h"

#include <cmath>

#include "../common/perturbation_math.h"
#include "perturbation_blocks.h"

namespace mmer {
inline namespace MMER_VARIANT {
namespace {

constexpr int kSums = 4;  // registers that sum side by side

MMER_INLINE double total(const Wide (&sums)[kSums]) {
  const Wide all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int j = 0; j < kWideLanes; ++j) total += all[j];
  return total;
}

// sum (w_i g_i)^2; without w sum g_i^2.
template <class C>
double sum_of_squares(const C* w, const C* g, int64_t n) {
  Wide sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWideLanes <= n; i += kSums * kWideLanes) {
    for (int s = 0; s < kSums; ++s) {
      Wide u = load_wide(g + i + s * kWideLanes);
      if (w != nullptr) u *= load_wide(w + i + s * kWideLanes);
      sums[s] += u * u;
    }
  }
  double rest = 0;
  for (; i < n; ++i) {
    const double u = w != nullptr ? static_cast<double>(w[i]) * static_cast<double>(g[i]) : static_cast<double>(g[i]);
    rest += u * u;
  }
  return total(sums) + rest;
}

// The same as a norm, where squares overflow or underflow; products that do are beyond any norm that double holds.
MMER_INLINE double scaled_norm(const double* w, const double* g, int64_t n) {
  return norm_of_norms(n, [&](int64_t i) MMER_INLINE_LAMBDA { return fabs(w != nullptr ? w[i] * g[i] : g[i]); });
}

// Squares of floats, and of products of two, fit a double; of doubles only some do.
template <class C>
double block_norm(const C* w, const C* g, int64_t n) {
  const double sum = sum_of_squares(w, g, n);
  if constexpr (sizeof(C) == 8) {
    constexpr double kSafe = 1e-250;
    if (!(sum > kSafe && sum < 1 / kSafe)) return scaled_norm(w, g, n);
  }
  return sqrt(sum);
}

// |u|_2 of entries [begin, end), u = w g or, without a weight, g.
template <class C>
double chunk_norm(const void* weight, DType weight_dtype, const void* grad, DType grad_dtype, int64_t begin,
                  int64_t end) {
  C w_buffer[kNormBlock], g_buffer[kNormBlock];
  double norms[kPerturbationChunk / kNormBlock];
  int64_t blocks = 0;
  for (int64_t i = begin; i < end; i += kNormBlock) {
    const int64_t n = end - i < kNormBlock ? end - i : kNormBlock;
    const C* w = weight == nullptr ? nullptr : stage(weight, weight_dtype, i, n, w_buffer);
    norms[blocks++] = block_norm(w, stage(grad, grad_dtype, i, n, g_buffer), n);
  }
  return norm_of_norms(blocks, [&](int64_t b) MMER_INLINE_LAMBDA { return norms[b]; });
}

double norm_of(const void* weight, DType weight_dtype, const void* grad, DType grad_dtype,
               const PerturbationChunk& chunk) {
  const bool wide = grad_dtype == DType::kFloat64 || (weight != nullptr && weight_dtype == DType::kFloat64);
  return wide ? chunk_norm<double>(weight, weight_dtype, grad, grad_dtype, chunk.begin, chunk.end)
              : chunk_norm<float>(weight, weight_dtype, grad, grad_dtype, chunk.begin, chunk.end);
}

// out_i = w_i + (d_i prescale) scale. In this order no product leaves the range: |w_i g_i| is at most the norm.
template <bool kAdaptive, class C>
void move(const C* w, const C* g, int64_t n, const PerturbationStep& step, C* out) {
  const double prescale = step.prescale, scale = step.scale;
  int64_t i = 0;
  for (; i + kWideLanes <= n; i += kWideLanes) {
    const Wide wide = load_wide(w + i);
    Wide d = load_wide(g + i);
    d = kAdaptive ? ((d * wide) * prescale) * wide : d * prescale;
    store_wide(out + i, wide + d * scale);
  }
  for (; i < n; ++i) {
    const double wide = static_cast<double>(w[i]);
    double d = static_cast<double>(g[i]);
    d = kAdaptive ? ((d * wide) * prescale) * wide : d * prescale;
    out[i] = static_cast<C>(wide + d * scale);
  }
}

template <class C>
void move_chunk(const PerturbationTensor& tensor, int64_t begin, int64_t end, const PerturbationStep& step,
                bool adaptive, bool streaming) {
  C w_buffer[kMoveBlock], g_buffer[kMoveBlock], moved[kMoveBlock];
  const int64_t bytes = entry_bytes(tensor.weight_dtype);
  char* weight = static_cast<char*>(tensor.weight);
  char* stash = static_cast<char*>(tensor.stash);
  for (int64_t i = begin; i < end; i += kMoveBlock) {
    const int64_t n = end - i < kMoveBlock ? end - i : kMoveBlock;
    copy_bytes(stash + i * bytes, weight + i * bytes, n * bytes, streaming);
    if (!step.moves()) continue;
    const C* w = stage(tensor.weight, tensor.weight_dtype, i, n, w_buffer);
    const C* g = stage(tensor.grad, tensor.grad_dtype, i, n, g_buffer);
    const bool in_place = w != w_buffer;
    C* out = in_place ? static_cast<C*>(tensor.weight) + i : moved;
    adaptive ? move<true>(w, g, n, step, out) : move<false>(w, g, n, step, out);
    if (!in_place) unstage(moved, tensor.weight, tensor.weight_dtype, i, n);
  }
}

}  // namespace

void perturbation_norm_chunks(const PerturbationCpuArgs& call, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const PerturbationChunk& chunk = call.chunks[c];
    const PerturbationTensor& tensor = call.args.tensors[chunk.tensor];
    const void* weight = call.args.adaptive ? tensor.weight : nullptr;
    call.parts[c] = norm_of(weight, tensor.weight_dtype, tensor.grad, tensor.grad_dtype, chunk);
    if (call.weight_parts != nullptr) {
      call.weight_parts[c] = norm_of(nullptr, tensor.weight_dtype, tensor.weight, tensor.weight_dtype, chunk);
    }
  }
}

void perturbation_apply_chunks(const PerturbationCpuArgs& call, int64_t begin, int64_t end) {
  constexpr int kDoubleExponents = 1020;
  for (int64_t c = begin; c < end; ++c) {
    const PerturbationChunk& chunk = call.chunks[c];
    const PerturbationTensor& tensor = call.args.tensors[chunk.tensor];
    const int64_t group = call.args.scope == PerturbationScope::kGlobal ? 0 : chunk.tensor;
    const bool awp = call.args.scope == PerturbationScope::kAwp;
    const double weight_norm = awp ? call.args.weight_norms[group] : 1.0;
    const PerturbationStep step(call.args.norms[group], call.args.radius * weight_norm, kDoubleExponents);
    const bool wide = tensor.weight_dtype == DType::kFloat64 || tensor.grad_dtype == DType::kFloat64;
    (wide ? move_chunk<double> : move_chunk<float>)(tensor, chunk.begin, chunk.end, step, call.args.adaptive,
                                                    call.streaming);
  }
  stream_fence();
}

void perturbation_restore_chunks(const PerturbationCpuArgs& call, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const PerturbationChunk& chunk = call.chunks[c];
    const PerturbationTensor& tensor = call.args.tensors[chunk.tensor];
    const int64_t bytes = entry_bytes(tensor.weight_dtype);
    copy_bytes(static_cast<char*>(tensor.weight) + chunk.begin * bytes,
               static_cast<const char*>(tensor.stash) + chunk.begin * bytes, (chunk.end - chunk.begin) * bytes,
               call.streaming);
  }
  stream_fence();
}

}  // namespace MMER_VARIANT
}  // namespace mmer
