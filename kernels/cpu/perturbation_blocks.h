// Entries of a flat tensor on their way through the perturbation: widened to double and rounded back, copied.
#pragma once

#include "perturbation.h"
#include "storage.h"

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

// As many halves as doubles fill a register, and floats.
#if defined(__AVX512F__)
MMER_INLINE __m256 half_floats(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
MMER_INLINE __m256 half_floats(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MMER_INLINE void store_floats(__m256 x, BFloat16* p) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __mmask8 nan = _mm256_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m256i rounded = _mm256_mask_mov_epi32(_mm256_srli_epi32(up, 16), nan, _mm256_set1_epi32(0x7FC0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtepi32_epi16(rounded));
}
MMER_INLINE void store_floats(__m256 x, Float16* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__) && defined(__F16C__)
MMER_INLINE __m128 half_floats(const BFloat16* p) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16));
}
MMER_INLINE __m128 half_floats(const Float16* p) {
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
MMER_INLINE void store_floats(__m128 x, BFloat16* p) {
  const __m128i bits = _mm_castps_si128(x);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  const __m128i up = _mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7FFF)), odd);
  const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(x, x));
  const __m128i rounded = _mm_blendv_epi8(_mm_srli_epi32(up, 16), _mm_set1_epi32(0x7FC0), nan);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(rounded, rounded));
}
MMER_INLINE void store_floats(__m128 x, Float16* p) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#else
template <class Half>
MMER_INLINE Narrow half_floats(const Half* p) {
  Narrow narrow;
  for (int j = 0; j < kWideLanes; ++j) narrow[j] = to_compute(p[j]);
  return narrow;
}
template <class Half>
MMER_INLINE void store_floats(Narrow x, Half* p) {
  for (int j = 0; j < kWideLanes; ++j) from_compute(x[j], p + j);
}
#endif

MMER_INLINE Wide widened(Narrow narrow) {
#if defined(__AVX512F__)
  return (Wide)_mm512_cvtps_pd((__m256)narrow);  // GCC 12 makes four instructions of the generic one
#else
  return __builtin_convertvector(narrow, Wide);
#endif
}

// From any storage type and back, rounded to nearest even; half types by way of floats.
template <class Storage>
MMER_INLINE Wide load_wide(const Storage* p) {
  if constexpr (sizeof(Storage) == 8) {
    Wide wide;
    std::memcpy(&wide, p, sizeof wide);
    return wide;
  } else {
    Narrow narrow;
    if constexpr (sizeof(Storage) == 4) {
      std::memcpy(&narrow, p, sizeof narrow);
    } else {
      const auto floats = half_floats(p);
      std::memcpy(&narrow, &floats, sizeof narrow);
    }
    return widened(narrow);
  }
}
template <class Storage>
MMER_INLINE void store_wide(Storage* p, Wide wide) {
  if constexpr (sizeof(Storage) == 8) {
    std::memcpy(p, &wide, sizeof wide);
  } else {
    const Narrow narrow = __builtin_convertvector(wide, Narrow);
    if constexpr (sizeof(Storage) == 4) {
      std::memcpy(p, &narrow, sizeof narrow);
    } else {
      decltype(half_floats(p)) floats;
      std::memcpy(&floats, &narrow, sizeof narrow);
      store_floats(floats, p);
    }
  }
}

// The same of one entry.
template <class Storage>
MMER_INLINE double entry_wide(Storage x) {
  return static_cast<double>(to_compute(x));
}
MMER_INLINE void store_entry(double* p, double x) { *p = x; }
template <class Storage>
MMER_INLINE void store_entry(Storage* p, double x) {
  from_compute(static_cast<float>(x), p);
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
