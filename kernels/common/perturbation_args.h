// Arguments of the adversarial weight perturbation, the same for CPU and CUDA: raw pointers and sizes.
//
//     plain      u_i = g_i           d_i = g_i
//     adaptive   u_i = |w_i| g_i     d_i = w_i^2 g_i                  (ASAM)
//
//     norm = |u|_2 over all tensors (global), or over each tensor (tensor, awp)
//     stash_i = w_i, bit for bit;   w_i <- w_i + factor d_i;   factor = gamma/norm, awp: gamma |w|_2/norm
//
// factor = 0 where a norm is 0 or not finite: these weights stay as they are, to the bit. Tensors are flat: entry i of
// weight, gradient and stash belong together.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"

namespace mmer {

struct PerturbationTensor {
  void* weight;
  const void* grad;
  void* stash;
  int64_t n;
  DType weight_dtype;  // of the stash too
  DType grad_dtype;
};

enum class PerturbationScope : int { kGlobal = 0, kTensor = 1, kAwp = 2 };

struct PerturbationArgs {
  const PerturbationTensor* tensors;  // [count], on the host
  int64_t count;
  PerturbationScope scope;
  bool adaptive;
  double radius;  // gamma >= 0

  // A group is what one norm is over: all tensors, or each. [groups] each, where the tensors are.
  const double* given_norms;         // or null: then computed
  const double* given_weight_norms;  // |w|_2 of each tensor, or null; only with given_norms and awp
  double* norms;
  double* weight_norms;  // |w|_2; null unless awp
  double* factors;       // null where only norms are wanted

  MMER_HD_MEMBER int64_t groups() const { return scope == PerturbationScope::kGlobal ? 1 : count; }
  MMER_HD_MEMBER bool needs_weight_norms() const { return scope == PerturbationScope::kAwp; }
};

}  // namespace mmer
