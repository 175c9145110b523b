// Adversarial weight perturbation, a chunk of a tensor at a time:
//
//     plain      u_i = g_i         d_i = g_i             part = |u|_2 of the chunk
//     adaptive   u_i = |w_i| g_i   d_i = w_i^2 g_i
//
//     stash_i = w_i (bits),   w_i <- w_i + (d_i prescale) scale
//
// Memory is read and written once; norms and adaptive steps are in double whatever the dtypes, other steps in the type
// that holds weight and gradient.
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

// sum u_i^2, u = w g or, without a weight, g.
template <class T>
double sum_of_squares(const T* w, const T* g, int64_t n) {
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
    double u = static_cast<double>(to_compute(g[i]));
    if (w != nullptr) u *= static_cast<double>(to_compute(w[i]));
    rest += u * u;
  }
  return total(sums) + rest;
}

// The same as a norm, where squares overflow or underflow; products that do are beyond any norm that double holds.
MMER_INLINE double scaled_norm(const double* w, const double* g, int64_t n) {
  return norm_of_norms(n, [&](int64_t i) MMER_INLINE_LAMBDA { return fabs(w != nullptr ? w[i] * g[i] : g[i]); });
}

// Squares of floats, and of products of two, fit a double; of doubles only some do.
template <class T>
double block_norm(const T* w, const T* g, int64_t n) {
  const double sum = sum_of_squares(w, g, n);
  if constexpr (sizeof(T) == 8) {
    constexpr double kSafe = 1e-250;
    if (!(sum > kSafe && sum < 1 / kSafe)) return scaled_norm(w, g, n);
  }
  return sqrt(sum);
}

// The norm of a chunk from those of its blocks, block_norm(begin, n).
template <class BlockNorm>
MMER_INLINE double chunk_norm(const PerturbationChunk& chunk, BlockNorm block_norm) {
  double norms[kPerturbationChunk / kNormBlock];
  int64_t blocks = 0;
  for (int64_t i = chunk.begin; i < chunk.end; i += kNormBlock) {
    norms[blocks++] = block_norm(i, chunk.end - i < kNormBlock ? chunk.end - i : kNormBlock);
  }
  return norm_of_norms(blocks, [&](int64_t b) MMER_INLINE_LAMBDA { return norms[b]; });
}

// |x|_2
double norm_of(const void* data, DType dtype, const PerturbationChunk& chunk) {
  double norm = 0;
  by_storage(dtype, [&](auto storage) {
    using T = decltype(storage);
    const T* x = static_cast<const T*>(data);
    norm = chunk_norm(chunk, [&](int64_t begin, int64_t n) MMER_INLINE_LAMBDA {
      return block_norm(static_cast<const T*>(nullptr), x + begin, n);
    });
    return true;
  });
  return norm;
}

// |w g|_2
template <class C>
double norm_of_products(const PerturbationTensor& tensor, const PerturbationChunk& chunk) {
  alignas(kVectorBytes) C w_buffer[kNormBlock], g_buffer[kNormBlock];
  return chunk_norm(chunk, [&](int64_t begin, int64_t n) MMER_INLINE_LAMBDA {
    const C* w = stage(tensor.weight, tensor.weight_dtype, begin, n, w_buffer);
    return block_norm(w, stage(tensor.grad, tensor.grad_dtype, begin, n, g_buffer), n);
  });
}

bool computes_in_double(const PerturbationTensor& tensor) {
  return tensor.weight_dtype == DType::kFloat64 || tensor.grad_dtype == DType::kFloat64;
}

// out_i = w_i + (g_i prescale) scale. The products lose no more of the step than rounding the sum loses of the weight.
template <class C>
void move(const C* w, const C* g, int64_t n, const PerturbationStep& step, C* out) {
  using V = typename Native<C>::V;
  constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(C));
  const C prescale = static_cast<C>(step.prescale), scale = static_cast<C>(step.scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    V weight, d;
    std::memcpy(&weight, w + i, sizeof weight);
    std::memcpy(&d, g + i, sizeof d);
    weight += (d * prescale) * scale;
    std::memcpy(out + i, &weight, sizeof weight);
  }
  for (; i < n; ++i) out[i] = w[i] + (g[i] * prescale) * scale;
}

// out_i = w_i + (w_i^2 g_i prescale) scale. In this order no product leaves the range: |w_i g_i| is at most the norm.
template <class C>
void move_adaptive(const C* w, const C* g, int64_t n, const PerturbationStep& step, C* out) {
  int64_t i = 0;
  for (; i + kWideLanes <= n; i += kWideLanes) {
    const Wide wide = load_wide(w + i);
    store_wide(out + i, wide + (((load_wide(g + i) * wide) * step.prescale) * wide) * step.scale);
  }
  for (; i < n; ++i) {
    const double wide = static_cast<double>(w[i]);
    out[i] = static_cast<C>(wide + (((static_cast<double>(g[i]) * wide) * step.prescale) * wide) * step.scale);
  }
}

template <class C>
void move_chunk(const PerturbationTensor& tensor, int64_t begin, int64_t end, const PerturbationStep& step,
                bool adaptive, bool streaming) {
  alignas(kVectorBytes) C w_buffer[kMoveBlock], g_buffer[kMoveBlock], moved[kMoveBlock];
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
    (adaptive ? move_adaptive<C> : move<C>)(w, g, n, step, out);
    if (!in_place) unstage(moved, tensor.weight, tensor.weight_dtype, i, n);
  }
}

}  // namespace

void perturbation_norm_chunks(const PerturbationCpuArgs& call, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const PerturbationChunk& chunk = call.chunks[c];
    const PerturbationTensor& tensor = call.args.tensors[chunk.tensor];
    if (!call.args.adaptive) {
      call.parts[c] = norm_of(tensor.grad, tensor.grad_dtype, chunk);
    } else {
      call.parts[c] = (computes_in_double(tensor) ? norm_of_products<double> : norm_of_products<float>)(tensor, chunk);
    }
    if (call.weight_parts != nullptr) call.weight_parts[c] = norm_of(tensor.weight, tensor.weight_dtype, chunk);
  }
}

void perturbation_apply_chunks(const PerturbationCpuArgs& call, int64_t begin, int64_t end) {
  constexpr int kFloatExponents = 126, kDoubleExponents = 1020;
  for (int64_t c = begin; c < end; ++c) {
    const PerturbationChunk& chunk = call.chunks[c];
    const PerturbationTensor& tensor = call.args.tensors[chunk.tensor];
    const int64_t group = call.args.scope == PerturbationScope::kGlobal ? 0 : chunk.tensor;
    const bool awp = call.args.scope == PerturbationScope::kAwp;
    const double weight_norm = awp ? call.args.weight_norms[group] : 1.0;
    const bool wide = computes_in_double(tensor);
    PerturbationStep step(call.args.norms[group], call.args.radius * weight_norm,
                          wide || call.args.adaptive ? kDoubleExponents : kFloatExponents);
    if (!wide && step.scale > FLT_MAX) step.scale = FLT_MAX;
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
