// Number types, the sigmoid and the sums of the soft top-k kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../common/soft_topk_args.h"
#include "../common/soft_topk_solver.h"

namespace mmer {

// Entries that one thread loads, stores and sums at a time: 16 bytes of the compute type.
template <typename Compute>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(Compute));

__device__ __forceinline__ float to_compute(float x) { return x; }
__device__ __forceinline__ double to_compute(double x) { return x; }
__device__ __forceinline__ float to_compute(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(double* p, double x) { *p = x; }
__device__ __forceinline__ void store(__half* p, float x) { *p = __float2half_rn(x); }
__device__ __forceinline__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

// Calls body(Type<Storage>{}) for the dtype that rows computed in `Compute` are stored in. The kernels are instantiated
// by compute type alone: only loads and stores know the storage type, and every thread takes the same branch.
template <typename Storage>
struct Type {
  using type = Storage;
};
template <typename Compute, typename Body>
__device__ __forceinline__ void with_storage(DType dtype, Body body) {
  if constexpr (sizeof(Compute) == 8) {
    body(Type<double>{});
  } else if (dtype == DType::kFloat32) {
    body(Type<float>{});
  } else if (dtype == DType::kBFloat16) {
    body(Type<__nv_bfloat16>{});
  } else {
    body(Type<__half>{});
  }
}

template <typename Compute>
__device__ __forceinline__ Compute infinity() {
  return static_cast<Compute>(INFINITY);
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }  // for x in [1, 2]
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

// T = sigma(t), U = 1 - T, w = T U and the signed distance of T from the nearer of 0 and 1, none by cancellation.
// t = -inf gives T = w = distance = 0.
template <typename Compute>
struct Sigmoid {
  Compute T, U, w, distance;

  __device__ __forceinline__ explicit Sigmoid(Compute t) {
    const Compute e = exponential(-fabs(t));
    const Compute large = reciprocal(1 + e);
    const Compute small = e * large;
    const bool upper = t >= 0;
    T = upper ? large : small;
    U = upper ? small : large;
    w = small * large;
    distance = upper ? -small : small;
  }
};

// 1 / tau, kept finite and above zero, so that neither 0 * inf nor inf * 0 arises at x = pivot or x = -inf.
template <typename Compute>
__device__ __forceinline__ Compute inverse_temperature(double tau) {
  constexpr double largest = sizeof(Compute) == 4 ? 3.0e38 : 1.0e308;
  constexpr double smallest = sizeof(Compute) == 4 ? 1.2e-38 : 2.3e-308;
  return static_cast<Compute>(fmin(fmax(1.0 / tau, smallest), largest));
}

// t = (x - pivot) / tau + c. x - pivot is exact near the threshold, where it matters.
template <typename Compute>
struct Argument {
  Compute pivot, inverse_tau, c;

  __device__ __forceinline__ Compute operator()(Compute x) const { return fma(x - pivot, inverse_tau, c); }
};

// A sum that keeps its rounding error (TwoSum), because float32 loses digits over long rows and float64 is slow on
// most GPUs.
template <typename Compute>
struct WideSum {
  float high = 0, low = 0;

  __device__ __forceinline__ void add(float x) {
    const float sum = __fadd_rn(high, x);
    const float old = __fadd_rn(sum, -x);
    low += __fadd_rn(__fadd_rn(high, -old), __fadd_rn(x, -__fadd_rn(sum, -old)));
    high = sum;
  }
  __device__ __forceinline__ double total() const { return static_cast<double>(high) + static_cast<double>(low); }
};
template <>
struct WideSum<double> {
  double high = 0;

  __device__ __forceinline__ void add(double x) { high += x; }
  __device__ __forceinline__ double total() const { return high; }
};

// The sum of a vector, so that the wide sum costs one addition per vector.
template <typename Compute>
__device__ __forceinline__ Compute vector_sum(const Compute (&x)[kVector<Compute>]) {
  if constexpr (kVector<Compute> == 4) {
    return (x[0] + x[1]) + (x[2] + x[3]);
  } else {
    return x[0] + x[1];
  }
}

// One thread's share of the row's sum of T: how many t >= 0, and the wide sum of the distances to 0 or 1.
template <typename Compute>
struct ThreadTotal {
  int upper = 0;
  WideSum<Compute> d;

  // Also returns the weights T of the entries.
  __device__ __forceinline__ void add(const Argument<Compute>& argument, const Compute* x, Compute* T) {
    Compute distance[kVector<Compute>];
#pragma unroll
    for (int j = 0; j < kVector<Compute>; ++j) {
      const Compute t = argument(x[j]);
      const Sigmoid<Compute> s(t);
      upper += t >= 0;
      distance[j] = s.distance;
      T[j] = s.T;
    }
    d.add(vector_sum<Compute>(distance));
  }
};

// One thread's share of SigmoidSums.
template <typename Compute>
struct ThreadSums {
  int upper = 0, active = 0, outer_upper = 0;
  WideSum<Compute> d, outer_d;
  Compute W = 0, wT = 0, ww = 0;

  __device__ __forceinline__ void add(const Argument<Compute>& argument, const Compute* x) {
    constexpr Compute edge = static_cast<Compute>(ThresholdSolver::kActive);
    Compute distance[kVector<Compute>], outside[kVector<Compute>];
#pragma unroll
    for (int j = 0; j < kVector<Compute>; ++j) {
      const Compute t = argument(x[j]);
      const Sigmoid<Compute> s(t);
      const bool inside = fabs(t) <= edge;
      upper += t >= 0;
      active += inside;
      outer_upper += t > edge;
      distance[j] = s.distance;
      outside[j] = inside ? Compute(0) : s.distance;
      W += s.w;
      wT = fma(s.w, s.T, wT);
      ww = fma(s.w, s.w, ww);
    }
    d.add(vector_sum<Compute>(distance));
    outer_d.add(vector_sum<Compute>(outside));
  }
};

// One thread's share of sum T and sum (1 - T) over the finite entries: what a Sinkhorn iteration needs.
template <typename Compute>
struct ThreadMarginals {
  WideSum<Compute> T, U;

  __device__ __forceinline__ void add(const Argument<Compute>& argument, const Compute* x) {
    Compute taken[kVector<Compute>], left[kVector<Compute>];
#pragma unroll
    for (int j = 0; j < kVector<Compute>; ++j) {
      const Sigmoid<Compute> s(argument(x[j]));
      taken[j] = s.T;
      left[j] = x[j] > -infinity<Compute>() ? s.U : Compute(0);
    }
    T.add(vector_sum<Compute>(taken));
    U.add(vector_sum<Compute>(left));
  }
};

// Keys in the order of the numbers: a < b as floats when key(a) < key(b) as unsigned integers. No -0, no NaN.
template <typename Compute>
struct OrderedKey;

template <>
struct OrderedKey<float> {
  using Bits = uint32_t;
  static __device__ __forceinline__ Bits encode(float x) {
    const Bits bits = __float_as_uint(x);
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
  }
  static __device__ __forceinline__ float decode(Bits key) {
    return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu));
  }
};

template <>
struct OrderedKey<double> {
  using Bits = uint64_t;
  static __device__ __forceinline__ Bits encode(double x) {
    const Bits bits = static_cast<Bits>(__double_as_longlong(x));
    return bits ^ (bits >> 63 ? ~Bits(0) : Bits(1) << 63);
  }
  static __device__ __forceinline__ double decode(Bits key) {
    return __longlong_as_double(static_cast<long long>(key ^ (key >> 63 ? Bits(1) << 63 : ~Bits(0))));
  }
};

}  // namespace mmer
