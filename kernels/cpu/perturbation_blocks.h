// Blocks of a flat tensor on their way through the perturbation: staged in the compute type, widened to double, copied.
#pragma once

#include <type_traits>

#include "perturbation.h"
#include "simd.h"

namespace mmer {
inline namespace MMER_VARIANT {

// Entries in flight. A long block is read at the speed of memory; where the copy of a block is written around the
// caches before the block is, short ones keep both streams going.
constexpr int64_t kNormBlock = 2048;
constexpr int64_t kMoveBlock = 512;

// A register of doubles, and the floats that become one.
typedef double Wide __attribute__((vector_size(kVectorBytes)));
typedef float Narrow __attribute__((vector_size(kVectorBytes / 2)));
constexpr int kWideLanes = kVectorBytes / 8;

MMER_INLINE Wide load_wide(const float* p) {
  Narrow narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  return __builtin_convertvector(narrow, Wide);
}
MMER_INLINE Wide load_wide(const double* p) {
  Wide wide;
  std::memcpy(&wide, p, sizeof wide);
  return wide;
}
// Half types by way of floats.
template <class Half>
MMER_INLINE Wide load_wide(const Half* p) {
  Narrow narrow;
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
  constexpr bool bfloat16 = std::is_same<Half, BFloat16>::value;
#if defined(__AVX512F__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256 floats =
      bfloat16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)) : _mm256_cvtph_ps(bits);
#else
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128 floats = bfloat16 ? _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16)) : _mm_cvtph_ps(bits);
#endif
  std::memcpy(&narrow, &floats, sizeof narrow);
#else
  for (int j = 0; j < kWideLanes; ++j) narrow[j] = to_compute(p[j]);
#endif
  return __builtin_convertvector(narrow, Wide);
}
MMER_INLINE void store_wide(float* p, Wide wide) {
  const Narrow narrow = __builtin_convertvector(wide, Narrow);
  std::memcpy(p, &narrow, sizeof narrow);
}
MMER_INLINE void store_wide(double* p, Wide wide) { std::memcpy(p, &wide, sizeof wide); }

MMER_INLINE int64_t entry_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 8;
    case DType::kFloat32: return 4;
    default: return 2;
  }
}

template <class S, class C>
MMER_INLINE const C* stage_as(const void* data, int64_t begin, int64_t n, C* buffer) {
  const S* first = static_cast<const S*>(data) + begin;
  if constexpr (sizeof(S) == sizeof(C)) {
    return first;  // the same type: half types are narrower than any compute type
  } else {
    convert_row(first, n, buffer);
    return buffer;
  }
}

// n entries from `begin` on in the compute type: where they are, or converted into the buffer.
template <class C>
const C* stage(const void* data, DType dtype, int64_t begin, int64_t n, C* buffer) {
  switch (dtype) {
    case DType::kFloat32: return stage_as<float>(data, begin, n, buffer);
    case DType::kBFloat16: return stage_as<BFloat16>(data, begin, n, buffer);
    case DType::kFloat16: return stage_as<Float16>(data, begin, n, buffer);
    default:
      if constexpr (sizeof(C) == 8) return stage_as<double>(data, begin, n, buffer);
      return nullptr;  // float64 computes in double
  }
}

template <class C, class S>
MMER_INLINE void unstage_as(const C* from, void* data, int64_t begin, int64_t n) {
  round_row(from, n, static_cast<S*>(data) + begin);
}

// Back to storage of another type, rounded to nearest even.
template <class C>
void unstage(const C* from, void* data, DType dtype, int64_t begin, int64_t n) {
  switch (dtype) {
    case DType::kFloat32: return unstage_as<C, float>(from, data, begin, n);
    case DType::kBFloat16: return unstage_as<C, BFloat16>(from, data, begin, n);
    default: return unstage_as<C, Float16>(from, data, begin, n);
  }
}

// One register to memory, around the caches.
MMER_INLINE void stream(unsigned char* to, const unsigned char* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  std::memcpy(to, from, kVectorBytes);
#endif
}

// Streamed bytes are ordered before what comes after.
MMER_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Bits as they are. A stream that fills whole registers saves the read of the line that an ordinary store does first.
MMER_INLINE void copy_bytes(void* to, const void* from, int64_t bytes, bool streaming) {
  unsigned char* out = static_cast<unsigned char*>(to);
  const unsigned char* in = static_cast<const unsigned char*>(from);
  if (!streaming || reinterpret_cast<uintptr_t>(out) % kVectorBytes != 0) {
    std::memcpy(out, in, static_cast<size_t>(bytes));
    return;
  }
  int64_t i = 0;
  for (; i + kVectorBytes <= bytes; i += kVectorBytes) stream(out + i, in + i);
  std::memcpy(out + i, in + i, static_cast<size_t>(bytes - i));
}

}  // namespace MMER_VARIANT
}  // namespace mmer
