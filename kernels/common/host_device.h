// Marks functions that the CPU kernels, the CUDA kernels and the C++ tests all compile from one definition.
#pragma once

#if defined(__CUDACC__)
#define MMER_HD __host__ __device__ __forceinline__
#define MMER_HD_MEMBER __host__ __device__ __forceinline__
#else
#define MMER_HD inline
// Outside the namespaces below: never a function of its own, which the linker would merge.
#define MMER_HD_MEMBER inline __attribute__((always_inline))
#endif

// The CPU kernels are built once per instruction set. Inline functions of each build live in a namespace of its own
// (-DMMER_VARIANT=avx512): merged by the linker, an AVX-512 body could end up in the baseline build.
#ifndef MMER_VARIANT
#define MMER_VARIANT generic
#endif
