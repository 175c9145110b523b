// What CPU and CUDA kernels of the perturbation share: norms of norms, and the step that a norm allows.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace mmer {
inline namespace MMER_VARIANT {

// |(p_0, p_1, ...)|_2 without overflow or underflow; not finite where a part is not. Always in the same order.
template <class Part>
MMER_HD double norm_of_norms(int64_t count, Part part) {
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double p = part(i);
    if (!(p <= DBL_MAX)) return p;
    largest = p > largest ? p : largest;
  }
  if (largest == 0) return 0;
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double q = part(i) / largest;
    sum += q * q;
  }
  return largest * sqrt(sum);
}

// factor d = (d prescale) scale: a power of two that brings d near 1, so that no product overflows or underflows.
struct PerturbationStep {
  double prescale, scale;

  // reach: the norm of the step, gamma or gamma |w|_2. exponents: of the type that computes, +-126 or +-1020.
  MMER_HD_MEMBER PerturbationStep(double norm, double reach, int exponents) : prescale(0), scale(0) {
    if (!(norm > 0 && norm <= DBL_MAX && reach <= DBL_MAX)) return;
    int exponent = ilogb(norm);
    exponent = exponent > exponents ? exponents : exponent < -exponents ? -exponents : exponent;
    prescale = ldexp(1.0, -exponent);
    scale = reach / (norm * prescale);
    scale = scale < DBL_MAX ? scale : DBL_MAX;  // infinity times 0 is no step
  }

  MMER_HD_MEMBER bool moves() const { return scale > 0; }
  MMER_HD_MEMBER double factor() const { return prescale * scale; }
};

}  // namespace MMER_VARIANT
}  // namespace mmer
