// Entries of a chunk: which of them a thread has, loads and stores of 16 bytes where addresses allow it.
#pragma once

#include <type_traits>

#include "perturbation_chunks.cuh"

namespace mmer {

// Calls body(T{}) with the type that a dtype is stored in. Every thread of a block takes the same branch.
template <class Body>
__device__ __forceinline__ void with_storage_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{});
    case DType::kFloat64: return body(double{});
    case DType::kBFloat16: return body(BFloat16{});
    case DType::kFloat16: return body(Half{});
  }
}

// double where any of the types is, else float.
template <class... Storage>
using ComputeType = std::conditional_t<(std::is_same_v<Storage, double> || ...), double, float>;

template <class Compute, class T>
__device__ __forceinline__ Compute to_compute_type(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return static_cast<Compute>(to_float(x));
  }
}

// Rounded to nearest; a double becomes a half type by way of float.
template <class T, class Compute>
__device__ __forceinline__ void store_rounded(T* p, Compute x) {
  if constexpr (std::is_same_v<T, double>) {
    *p = x;
  } else {
    store(p, static_cast<float>(x));
  }
}

// A thread's entries in one pass of its block over a chunk: kVectors times kWidth, vectors side by side with those of
// its neighbours. Guarded: some may lie behind the end of the chunk.
template <int kWidth_, int kVectors, bool kGuarded>
struct Place {
  static constexpr int kWidth = kWidth_, kEntries = kWidth * kVectors;
  static constexpr int kPass = kPerturbationThreads * kEntries;  // entries of the block

  int first, count;

  __device__ __forceinline__ Place(int begin, int entries)
      : first(begin + static_cast<int>(threadIdx.x) * kWidth), count(entries) {}

  __device__ __forceinline__ int at(int entry) const {
    return first + entry / kWidth * (kPerturbationThreads * kWidth) + entry % kWidth;
  }
  __device__ __forceinline__ bool has(int entry) const { return !kGuarded || at(entry) < count; }
};

// Calls body(place) for all passes over a chunk: by vectors where `vectors`, but for what fills no pass; that, and all
// of it otherwise, entry by entry.
template <int kWidth, int kVectors, class Body>
__device__ __forceinline__ void for_each_pass(int count, bool vectors, Body body) {
  using Whole = Place<kWidth, kVectors, false>;
  using Rest = Place<1, 4, true>;
  int begin = 0;
#pragma unroll 1
  for (; vectors && begin + Whole::kPass <= count; begin += Whole::kPass) body(Whole(begin, count));
#pragma unroll 1
  for (; begin < count; begin += Rest::kPass) body(Rest(begin, count));
}

// Entries of a vector, which is 16 bytes of the widest type.
template <class... Storage>
inline constexpr int kVectorWidth = 16 / static_cast<int>(std::max({sizeof(Storage)...}));

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) EntryVector {
  T entry[kWidth];
};

template <class T>
__device__ __forceinline__ bool aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// What lies behind the end of the chunk is 0. vectors: `data` is aligned.
template <class T, int kWidth, int kVectors, bool kGuarded>
__device__ __forceinline__ void load_entries(const T* data, const Place<kWidth, kVectors, kGuarded>& place,
                                             bool vectors, T (&x)[kWidth * kVectors]) {
  if (kWidth > 1 && vectors) {
#pragma unroll
    for (int i = 0; i < kWidth * kVectors; i += kWidth) {
      const auto vector = *reinterpret_cast<const EntryVector<T, kWidth>*>(data + place.at(i));
#pragma unroll
      for (int e = 0; e < kWidth; ++e) x[i + e] = vector.entry[e];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth * kVectors; ++i) x[i] = place.has(i) ? data[place.at(i)] : T{};
  }
}

// `data` is aligned where the place is made of vectors.
template <class T, int kWidth, int kVectors, bool kGuarded>
__device__ __forceinline__ void store_entries(T* data, const Place<kWidth, kVectors, kGuarded>& place,
                                              const T (&x)[kWidth * kVectors]) {
#pragma unroll
  for (int i = 0; i < kWidth * kVectors; i += kWidth) {
    if (!place.has(i)) continue;
    EntryVector<T, kWidth> vector;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) vector.entry[e] = x[i + e];
    *reinterpret_cast<EntryVector<T, kWidth>*>(data + place.at(i)) = vector;
  }
}

template <class Bits>
__device__ __forceinline__ void copy_entries(void* to, const void* from, int count) {
  const Bits* source = static_cast<const Bits*>(from);
  Bits* target = static_cast<Bits*>(to);
  const bool vectors = aligned(source) && aligned(target);
  for_each_pass<kVectorWidth<Bits>, 4>(count, vectors, [&](const auto& place) {
    Bits x[std::decay_t<decltype(place)>::kEntries];
    load_entries(source, place, vectors, x);
    store_entries(target, place, x);
  });
}

// Bit for bit, as integers.
__device__ __forceinline__ void copy_chunk(void* to, const void* from, int count, DType dtype) {
  switch (entry_bytes(dtype)) {
    case 2: return copy_entries<uint16_t>(to, from, count);
    case 4: return copy_entries<uint32_t>(to, from, count);
    default: return copy_entries<uint64_t>(to, from, count);
  }
}

}  // namespace mmer
