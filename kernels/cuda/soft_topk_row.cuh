// One row in device memory: which entries are valid, vector loads and stores, tau of the row.
#pragma once

#include "soft_topk_math.cuh"

namespace mmer {

// `count` entries that one instruction moves.
template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T entry[count];
};

// Row r of a strided [R, n] matrix in device memory, in the dtype of the scores.
template <typename Compute>
class MatrixRow {
 public:
  static constexpr int kWidth = kVector<Compute>;

  __device__ __forceinline__ MatrixRow(const void* base, int64_t row, int64_t stride, DType dtype)
      : data_(const_cast<char*>(static_cast<const char*>(base)) + row * stride * entry_bytes(dtype)), dtype_(dtype) {}

  // Whether packs may be moved at columns that are multiples of kWidth.
  __device__ __forceinline__ bool aligned() const {
    return reinterpret_cast<uintptr_t>(data_) % static_cast<uintptr_t>(kWidth * entry_bytes(dtype_)) == 0;
  }

  // Calls body(pointer to the row's first entry) with the pointer's true type.
  template <typename Body>
  __device__ __forceinline__ void typed(Body body) const {
    with_storage<Compute>(dtype_, [&](auto tag) { body(reinterpret_cast<typename decltype(tag)::type*>(data_)); });
  }

 private:
  char* data_;
  DType dtype_;
};

// Loads x[0 .. kVector) from columns(0), columns(1) .. of a row, which follow each other where `vectorised`; 0 from
// `limit` on.
template <typename Storage, typename Compute, typename Columns>
__device__ __forceinline__ void load_pack(const Storage* data, int limit, bool vectorised, Columns columns,
                                          Compute* x) {
  constexpr int width = kVector<Compute>;
  if (vectorised && columns(width - 1) < limit) {
    const auto pack = *reinterpret_cast<const Pack<Storage, width>*>(data + columns(0));
#pragma unroll
    for (int j = 0; j < width; ++j) x[j] = to_compute(pack.entry[j]);
  } else {
#pragma unroll
    for (int j = 0; j < width; ++j) x[j] = columns(j) < limit ? to_compute(data[columns(j)]) : Compute(0);
  }
}

// Stores x[0 .. kVector) at columns(0), columns(1) .. of a row, which follow each other where `vectorised`; what lies
// past `cols` is dropped.
template <typename Storage, typename Compute, typename Columns>
__device__ __forceinline__ void store_pack(Storage* data, int cols, bool vectorised, Columns columns,
                                           const Compute* x) {
  constexpr int width = kVector<Compute>;
  if (vectorised && columns(width - 1) < cols) {
    Pack<Storage, width> pack;
#pragma unroll
    for (int j = 0; j < width; ++j) store(&pack.entry[j], x[j]);
    *reinterpret_cast<Pack<Storage, width>*>(data + columns(0)) = pack;
  } else {
#pragma unroll
    for (int j = 0; j < width; ++j) {
      if (columns(j) < cols) store(data + columns(j), x[j]);
    }
  }
}

// The scores of a row with their validity, sign and temperature.
template <typename Compute>
struct Row {
  static constexpr int kWidth = kVector<Compute>;

  MatrixRow<Compute> scores;
  const uint8_t* mask;
  int length;  // entries from here on are padding
  int cols;
  Compute sign;
  double tau;

  // A row past the last one is empty, so that whole warps stay together.
  __device__ __forceinline__ Row(const SoftTopKRows& in, int64_t row)
      : scores(in.scores, row < in.rows ? row : 0, in.scores_stride, in.dtype) {
    const bool live = row < in.rows;
    const int64_t r = live ? row : 0;
    cols = static_cast<int>(in.cols);
    mask = in.mask != nullptr ? in.mask + r * in.mask_stride : nullptr;
    int64_t valid = in.lengths != nullptr ? in.lengths[r] : in.cols;
    valid = valid < 0 ? 0 : (valid > in.cols ? in.cols : valid);
    length = live ? static_cast<int>(valid) : 0;
    sign = in.largest ? Compute(1) : Compute(-1);
    tau = usable_tau(in.tau != nullptr ? in.tau[r] : in.tau_value, sizeof(Compute) == 4);
  }

  __device__ __forceinline__ bool valid(int column) const {
    return column < length && (mask == nullptr || mask[column] != 0);
  }

  // x = sign * s of an entry, -inf where it takes no part: it then adds nothing to any sum. Adding zero turns -0 into
  // +0, so that equal scores have equal keys.
  __device__ __forceinline__ Compute ordered(Compute s, bool is_valid) const {
    return is_valid ? fma(sign, s, Compute(0)) : -infinity<Compute>();
  }

  // T of an entry x in a row without a root: 0, 1 or NaN for the finite entries. A NaN row is NaN wherever valid.
  static __device__ __forceinline__ Compute filled(Compute fill, Compute x, bool is_valid) {
    const bool taken = fill == fill ? x > -infinity<Compute>() : is_valid;
    return taken ? fill : Compute(0);
  }
};

}  // namespace mmer
