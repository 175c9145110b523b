// In place of the toolkit's header, on the host: CUDA's built-ins, and what the kernels define for nvcc alone.
//
// Every thread of a block is a fiber, and so is every thread of the other blocks of its cluster. One runs at a time; at
// a warp's collective (ldmatrix, mma, shuffle) it stops until all 32 lanes are there. Between two barriers a warp runs
// as far as it can before the next one, drawn by chance, does, so that what a barrier should order and does not comes
// out wrong. Asynchronous copies land at once or only at the wait, by chance too. Shared memory is NaN at first, and
// again when its block has ended; behind it lies a page without access.
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

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace emulation {

constexpr int kSharedLimit = 99 * 1024;  // bytes a block, on the smallest of the architectures
constexpr int kSharedUnasked = 48 * 1024;

constexpr unsigned kPortableCluster = 8, kLargestCluster = 16;  // blocks

// What a kernel asked for.
struct Function {
  int shared_bytes = kSharedUnasked;
  unsigned cluster = kPortableCluster;
};
inline std::map<void*, Function>& functions() {
  static std::map<void*, Function> functions;
  return functions;
}

unsigned cluster_of(const cudaLaunchConfig_t& config);
unsigned resident_cluster();  // the largest that the device has room for
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

// Collectives of a warp. An argument of the same bits for all lanes but `x`, which is each lane's own.
uint64_t shuffle(uint64_t x, int source);
bool any(bool x);
unsigned sum(unsigned x);

unsigned char* shared_memory(uint32_t address);
unsigned char* shared_memory_of(unsigned rank, const void* own);  // where another block of the cluster has `own`
void cluster_barrier();

template <class T>
T shuffled(T x, int source) {
  constexpr size_t kParts = (sizeof(T) + 7) / 8;
  uint64_t bits[kParts] = {};
  std::memcpy(bits, &x, sizeof(T));
  for (uint64_t& part : bits) part = shuffle(part, source);
  std::memcpy(&x, bits, sizeof(T));
  return x;
}

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

template <class To, class From>
To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  std::memcpy(&to, &x, sizeof to);
  return to;
}

}  // namespace emulation

void __syncthreads();
inline void __syncwarp() {}  // orders nothing that the kernels need

template <class T>
T __shfl_xor_sync(unsigned, T x, int distance) {
  return emulation::shuffled(x, emulation::lane() ^ distance);
}
template <class T>
T __shfl_down_sync(unsigned, T x, int distance) {
  const int source = emulation::lane() + distance;
  return emulation::shuffled(x, source < 32 ? source : emulation::lane());
}
inline bool __any_sync(unsigned, bool x) { return emulation::any(x); }
inline unsigned __reduce_add_sync(unsigned, unsigned x) { return emulation::sum(x); }

inline int atomicAdd(int* address, int x) { return (*address += x) - x; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float x) { return emulation::same_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulation::same_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulation::same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulation::same_bits<double>(x); }

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  emulation::Function& function = emulation::functions()[reinterpret_cast<void*>(kernel)];
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    function.cluster = value != 0 ? emulation::kLargestCluster : emulation::kPortableCluster;
    return cudaSuccess;
  }
  if (value > emulation::kSharedLimit) return cudaErrorInvalidValue;
  function.shared_bytes = value;
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  return attributes->ptxVersion = __CUDA_ARCH__ / 10, cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, void (*)(Parameters...), const cudaLaunchConfig_t* config) {
  return *count = emulation::cluster_of(*config) <= emulation::resident_cluster(), cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const emulation::Function function = emulation::functions()[reinterpret_cast<void*>(kernel)];
  if (config->dynamicSmemBytes > static_cast<size_t>(function.shared_bytes)) return cudaErrorInvalidValue;
  if (emulation::cluster_of(*config) > function.cluster) return cudaErrorInvalidValue;
  return emulation::run(*config, [&] { kernel(arguments...); });
}

using std::exp;
using std::fabs;
using std::fma;
using std::max;
using std::min;

namespace mmer {

// Of soft_topk_launch.cuh.
inline unsigned char* block_shared() { return emulation::shared_memory(0); }

// Of attention_warp.cuh.
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

inline uint32_t float_bits(float x) { return emulation::same_bits<uint32_t>(x); }
inline float bits_float(uint32_t bits) { return emulation::same_bits<float>(bits); }

}  // namespace mmer
