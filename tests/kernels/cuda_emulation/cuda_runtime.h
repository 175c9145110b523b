// In place of the toolkit's header: CUDA's built-ins and the functions of attention_warp.cuh, on the host.
//
// Every thread of a block is a fiber. One runs at a time; at a warp's collective (ldmatrix, mma, shuffle) it stops
// until all 32 lanes are there. Between two barriers a warp runs as far as it can before the next one, drawn by chance,
// does, so that what a barrier should order and does not comes out wrong. Asynchronous copies land at once or only at
// the wait, by chance too. Shared memory is NaN at first and ends at a page without access.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

extern dim3 threadIdx, blockIdx, gridDim;  // of the fiber that runs

namespace emulation {

constexpr int kSharedLimit = 99 * 1024;  // bytes a block, on the smallest of the architectures
constexpr int kSharedUnasked = 48 * 1024;

// The bytes of dynamic shared memory that a kernel asked for.
inline std::map<void*, int>& shared_limits() {
  static std::map<void*, int> limits;
  return limits;
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);
uint32_t shuffle_xor(uint32_t bits, int distance);
unsigned char* shared_memory(uint32_t address);

}  // namespace emulation

void __syncthreads();
inline void __syncwarp() {}  // orders nothing that the kernels need

template <class T>
T __shfl_xor_sync(unsigned, T x, int distance) {
  static_assert(sizeof(T) % 4 == 0, "whole registers");
  uint32_t bits[sizeof(T) / 4];
  std::memcpy(bits, &x, sizeof(T));
  for (uint32_t& part : bits) part = emulation::shuffle_xor(part, distance);
  std::memcpy(&x, bits, sizeof(T));
  return x;
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  if (bytes > emulation::kSharedLimit) return cudaErrorInvalidValue;
  emulation::shared_limits()[reinterpret_cast<void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const auto& limits = emulation::shared_limits();
  const auto asked = limits.find(reinterpret_cast<void*>(kernel));
  const int limit = asked == limits.end() ? emulation::kSharedUnasked : asked->second;
  if (config->dynamicSmemBytes > static_cast<size_t>(limit)) return cudaErrorInvalidValue;
  return emulation::run(*config, [&] { kernel(arguments...); });
}

using std::max;
using std::min;

namespace mmer {

struct Half;
struct BFloat16;

uint32_t dynamic_shared();
uint32_t load_word(uint32_t address);
void load_matrices(uint32_t (&r)[4], uint32_t row);
void load_matrices_transposed(uint32_t (&r)[4], uint32_t row);
void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16);
void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half);
void mma_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void copy_async(uint32_t shared, const void* global, int bytes);
void copy_wait();
float exp2_fast(float x);
uint32_t pack(float low, float high, BFloat16);
uint32_t pack(float low, float high, Half);
float to_float(Half x);

template <class T>
T* shared_pointer(uint32_t address) {
  return reinterpret_cast<T*>(emulation::shared_memory(address));
}

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

}  // namespace mmer
