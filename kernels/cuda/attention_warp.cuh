// What the attention kernels need of a warp that C++ has no words for: tensor cores, asynchronous copies, conversions.
//
// Nothing else in them is PTX, so that the same sources run on the host where another header defines these functions
// and the few CUDA built-ins that the kernels use (tests/kernels/cuda_emulation). Fragment layouts are those of the PTX
// ISA: with g = lane / 4 and t = lane % 4, a 16 x 8 sum holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mmer {

// Storage only: all arithmetic is in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

#if defined(__CUDACC__)

// Shared memory is addressed by 32-bit numbers; a block's dynamic shared memory begins at a multiple of 1024.
__device__ __forceinline__ uint32_t dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_bytes[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_bytes));
}

template <class T>
__device__ __forceinline__ T* shared_pointer(uint32_t address) {
  return static_cast<T*>(__cvta_shared_to_generic(address));
}

__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

// Four 8 x 8 matrices of 16-bit entries. Lane l gives the address of 16 bytes, row l % 8 of matrix l / 8, and gets the
// entries (g, 2t) and (g, 2t + 1) of each matrix.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// The same, transposed: a lane gets the entries (2t, g) and (2t + 1, g).
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// sum += a b for a 16 x 16 and b 16 x 8. a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8) and the column after
// each; b: (2t, g), (2t + 8, g) and the row after each.
__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum += a b for a 16 x 8 and b 8 x 8 of TF32 numbers (float bits whose last 13 are 0). a: (g, t), (g + 8, t),
// (g, t + 4), (g + 8, t + 4); b: (t, g), (t + 4, g).
__device__ __forceinline__ void mma_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Begins to copy 16 bytes: the first `bytes` of them from global memory (16-byte aligned), the others 0.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared), "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

// Waits for the copies that this thread began. The others' are there after a barrier.
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" : : : "memory"); }

// 2^x to about 2 ulp; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float bits_float(uint32_t x) { return __uint_as_float(x); }

// Two numbers in one register, the first in its low half.
__device__ __forceinline__ uint32_t pack(float low, float high, BFloat16) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t pack(float low, float high, Half) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

#endif  // __CUDACC__

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

// From a float, rounded to nearest.
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
template <class T>
__device__ __forceinline__ void store(T* p, float x) {
  p->bits = static_cast<uint16_t>(pack(x, 0.0f, T{}));
}

// Two neighbours; p is aligned for both.
__device__ __forceinline__ void store_pair(float* p, float x, float y) {
  *reinterpret_cast<float2*>(p) = make_float2(x, y);
}
template <class T>
__device__ __forceinline__ void store_pair(T* p, float x, float y) {
  *reinterpret_cast<uint32_t*>(p) = pack(x, y, T{});
}

// Over the four lanes of a quad, which hold a row of a 16 x 8 sum; the same bits in all of them.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

}  // namespace mmer
