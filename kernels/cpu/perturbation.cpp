// Adversarial weight perturbation, a chunk of a tensor at a time:
//
//     plain      u_i = g_i         d_i = g_i             part = |u|_2 of the chunk
//     adaptive   u_i = |w_i| g_i   d_i = w_i^2 g_i
//
//     stash_i = w_i (bits),   w_i <- w_i + (d_i prescale) scale
//
// Memory is read and written once and little else costs: all arithmetic is in double, whatever the dtypes, but for
// steps of half weights that float computes to the same bits.
#include "perturbation.h"

#include <cmath>

#include "../common/perturbation_math.h"
#include "perturbation_blocks.h"
#include "perturbation_halves.h"

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
template <class W, class G>
double sum_of_squares(const W* w, const G* g, int64_t n) {
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
    const double u = w != nullptr ? entry_wide(w[i]) * entry_wide(g[i]) : entry_wide(g[i]);
    rest += u * u;
  }
  return total(sums) + rest;
}

// The same as a norm, where squares overflow or underflow; products that do are beyond any norm that double holds.
template <class W, class G>
double scaled_norm(const W* w, const G* g, int64_t n) {
  return norm_of_norms(n, [&](int64_t i) MMER_INLINE_LAMBDA {
    return fabs(w != nullptr ? entry_wide(w[i]) * entry_wide(g[i]) : entry_wide(g[i]));
  });
}

// Squares of floats, and of products of two, fit a double; of doubles only some do.
template <class W, class G>
double block_norm(const W* w, const G* g, int64_t n) {
  const double sum = sum_of_squares(w, g, n);
  if constexpr (sizeof(W) == 8 || sizeof(G) == 8) {
    constexpr double kSafe = 1e-250;
    if (!(sum > kSafe && sum < 1 / kSafe)) return scaled_norm(w, g, n);
  }
  return sqrt(sum);
}

// |u|_2 of a chunk; w is null or its tensor's.
template <class W, class G>
double chunk_norm(const W* w, const G* g, const PerturbationChunk& chunk) {
  double norms[kPerturbationChunk / kNormBlock];
  int64_t blocks = 0;
  for (int64_t i = chunk.begin; i < chunk.end; i += kNormBlock) {
    const int64_t n = chunk.end - i < kNormBlock ? chunk.end - i : kNormBlock;
    norms[blocks++] = block_norm(w == nullptr ? w : w + i, g + i, n);
  }
  return norm_of_norms(blocks, [&](int64_t b) MMER_INLINE_LAMBDA { return norms[b]; });
}

// |x|_2
double norm_of(const void* data, DType dtype, const PerturbationChunk& chunk) {
  double norm = 0;
  by_storage(dtype, [&](auto storage) {
    using T = decltype(storage);
    norm = chunk_norm(static_cast<const T*>(nullptr), static_cast<const T*>(data), chunk);
    return true;
  });
  return norm;
}

// Calls f(weight, grad) with pointers to their storage types.
template <class F>
MMER_INLINE void by_storages(const PerturbationTensor& tensor, F f) {
  by_storage(tensor.weight_dtype, [&](auto weight_storage) {
    return by_storage(tensor.grad_dtype, [&](auto grad_storage) {
      f(static_cast<decltype(weight_storage)*>(tensor.weight), static_cast<const decltype(grad_storage)*>(tensor.grad));
      return true;
    });
  });
}

// |w g|_2
double norm_of_products(const PerturbationTensor& tensor, const PerturbationChunk& chunk) {
  double norm = 0;
  by_storages(tensor, [&](const auto* w, const auto* g) { norm = chunk_norm(w, g, chunk); });
  return norm;
}

// w_i <- w_i + (d_i prescale) scale. In this order no product leaves the range: |w_i g_i| is at most the norm.
template <bool kAdaptive, class W, class G>
MMER_INLINE void move_register(W* w, const G* g, double prescale, double scale) {
  const Wide wide = load_wide(w);
  Wide d = load_wide(g);
  d = kAdaptive ? ((d * wide) * prescale) * wide : d * prescale;
  store_wide(w, wide + d * scale);
}

template <bool kAdaptive, class W, class G>
void move(W* w, const G* g, int64_t n, const PerturbationStep& step) {
  const double prescale = step.prescale, scale = step.scale;
  int64_t i = 0;
  if constexpr (kHasHalfSteps && !kAdaptive && sizeof(W) == 2 && sizeof(G) <= 4) {
    if (floats_suffice(step.factor())) {
      const float factor = static_cast<float>(step.factor());
      for (; i + kFloats <= n; i += kFloats) {
        if (half_step(w + i, g + i, factor)) continue;
        for (int j = 0; j < kFloats; j += kWideLanes) move_register<false>(w + i + j, g + i + j, prescale, scale);
      }
    }
  }
  for (; i + kWideLanes <= n; i += kWideLanes) move_register<kAdaptive>(w + i, g + i, prescale, scale);
  for (; i < n; ++i) {
    const double wide = entry_wide(w[i]);
    double d = entry_wide(g[i]);
    d = kAdaptive ? ((d * wide) * prescale) * wide : d * prescale;
    store_entry(w + i, wide + d * scale);
  }
}

template <class W, class G>
void move_chunk(W* w, const G* g, W* stash, const PerturbationChunk& chunk, const PerturbationStep& step, bool adaptive,
                bool streaming) {
  for (int64_t i = chunk.begin; i < chunk.end; i += kMoveBlock) {
    const int64_t n = chunk.end - i < kMoveBlock ? chunk.end - i : kMoveBlock;
    copy_bytes(stash + i, w + i, n * static_cast<int64_t>(sizeof(W)), streaming);
    if (step.moves()) (adaptive ? move<true, W, G> : move<false, W, G>)(w + i, g + i, n, step);
  }
}

}  // namespace

void perturbation_norm_chunks(const PerturbationCpuArgs& call, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const PerturbationChunk& chunk = call.chunks[c];
    const PerturbationTensor& tensor = call.args.tensors[chunk.tensor];
    call.parts[c] =
        call.args.adaptive ? norm_of_products(tensor, chunk) : norm_of(tensor.grad, tensor.grad_dtype, chunk);
    if (call.weight_parts != nullptr) call.weight_parts[c] = norm_of(tensor.weight, tensor.weight_dtype, chunk);
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
    by_storages(tensor, [&](auto* w, const auto* g) {
      move_chunk(w, g, static_cast<decltype(w)>(tensor.stash), chunk, step, call.args.adaptive, call.streaming);
    });
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
