// A block's slice of a long row. As much of it as fits is kept in shared memory, ordered and masked; what is beyond is
// read again in every sweep, from L2 when the row fits there.
//
// A thread only ever reads the staged entries that it wrote itself, so staging needs no barrier.
#pragma once

#include "soft_topk_launch.cuh"
#include "soft_topk_row.cuh"
#include "soft_topk_team.cuh"

namespace mmer {

// What warp 0 tells the block after each turn of the solver.
template <typename Compute>
struct Plan {
  Argument<Compute> argument;
  Compute scale;  // of the Sinkhorn output, k / S
  Compute fill;
  bool saturated;
  ThresholdSolver::Action action;
};

template <typename Compute>
class LongRow {
 public:
  static constexpr int kWidth = kVector<Compute>;

  __device__ __forceinline__ LongRow(const Row<Compute>& row, const TeamShape& shape, int rank, Compute* staged)
      : row_(row),
        vectorised_(row.scores.aligned()),
        first_(rank * shape.slice),
        staged_count_(shape.staged),
        staged_(staged) {
    const int rest = row.cols - first_;
    count_ = rest < 0 ? 0 : (rest < shape.slice ? rest : shape.slice);
  }

  // Calls body(base, x) for every batch of the slice, x being this thread's packs; columns past the row read as -inf.
  template <typename Body>
  __device__ __forceinline__ void for_each_batch(Body body) const {
    alignas(16) Compute x[kBatchPacks][kWidth];
    for (int base = 0; base < count_; base += kSpan) {
      if (base < staged_count_) {
#pragma unroll
        for (int b = 0; b < kBatchPacks; ++b) copy_pack(staged_ + base + offset(b), x[b]);
      } else {
        stream(base, x);
      }
      body(base, x);
    }
  }

  // Calls body(column, x[kWidth]) for every pack of the slice.
  template <typename Body>
  __device__ __forceinline__ void for_each_pack(Body body) const {
    for_each_batch([&](int base, const Compute(&x)[kBatchPacks][kWidth]) { for_each_of_batch(base, x, body); });
  }

  // Calls body(column, x, y) for every pack of the slice, y from another matrix than the scores.
  template <typename Body>
  __device__ __forceinline__ void for_each_pack_with(const MatrixRow<Compute>& other, Body body) const {
    const bool vectorised = other.aligned();
    for_each_batch([&](int base, const Compute(&x)[kBatchPacks][kWidth]) {
      Compute y[kBatchPacks][kWidth];
      load_batch(other, vectorised, base, y);
#pragma unroll
      for (int b = 0; b < kBatchPacks; ++b) {
        if (base + offset(b) < count_) body(first_ + base + offset(b), x[b], y[b]);
      }
    });
  }

  // The first sweep: fills the staged part and measures the row. Variance about the row's first entry, so that a
  // common offset does not cancel. The result is valid in warp 0.
  __device__ __forceinline__ RowStats stage_and_measure(Team& team) const {
    Compute head = 0;
    if (row_.valid(0)) row_.scores.typed([&](const auto* data) { head = row_.ordered(to_compute(data[0]), true); });
    const Compute origin = head > -infinity<Compute>() && head < infinity<Compute>() ? head : Compute(0);
    Compute total = 0, squares = 0, low = infinity<Compute>(), high = -infinity<Compute>();
    int valid = 0, finite = 0;
    bool poisoned = false;
    const auto measure = [&](int column, const Compute* x) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const bool is_finite = x[j] > -infinity<Compute>() && x[j] < infinity<Compute>();
        const Compute d = is_finite ? x[j] - origin : Compute(0);
        total += d;
        squares = fma(d, d, squares);
        low = is_finite && x[j] < low ? x[j] : low;
        high = is_finite && x[j] > high ? x[j] : high;
        finite += is_finite;
        poisoned |= !(x[j] < infinity<Compute>());
        if (row_.mask != nullptr) valid += row_.valid(column + j);
      }
    };
    alignas(16) Compute x[kBatchPacks][kWidth];
    for (int base = 0; base < count_; base += kSpan) {
      stream(base, x);
      for_each_of_batch(base, x, measure);
      if (base < staged_count_) {
#pragma unroll
        for (int b = 0; b < kBatchPacks; ++b) copy_pack(x[b], staged_ + base + offset(b));
      }
    }
    double values[] = {static_cast<double>(valid),   static_cast<double>(finite), static_cast<double>(total),
                       static_cast<double>(squares), -static_cast<double>(low),   static_cast<double>(high),
                       poisoned ? 1.0 : 0.0};
    team.reduce<4>(values);
    RowStats stats;
    stats.valid = row_.mask != nullptr ? values[0] : static_cast<double>(row_.length);
    stats.finite = values[1];
    const double entries = values[1] > 0 ? values[1] : 1.0;
    const double shift = values[2] / entries;
    stats.mean = static_cast<double>(origin) + shift;
    stats.var = fmax(values[3] / entries - shift * shift, 0.0);
    stats.min = -values[4];
    stats.max = values[5];
    stats.poisoned = values[6] > 0;
    return stats;
  }

  // One sweep of sigmoids; the result is valid in warp 0.
  __device__ __forceinline__ SigmoidSums sigmoids(Team& team, const Argument<Compute>& argument) const {
    ThreadSums<Compute> part;
    for_each_pack([&](int, const Compute* x) { part.add(argument, x); });
    double values[] = {static_cast<double>(part.upper),       part.d.total(),
                       static_cast<double>(part.W),           static_cast<double>(part.wT),
                       static_cast<double>(part.ww),          static_cast<double>(part.active),
                       static_cast<double>(part.outer_upper), part.outer_d.total()};
    team.reduce<8>(values);
    SigmoidSums sums;
    sums.upper = values[0];
    sums.d = values[1];
    sums.W = values[2];
    sums.wT = values[3];
    sums.ww = values[4];
    sums.active = values[5];
    sums.outer_upper = values[6];
    sums.outer_d = values[7];
    return sums;
  }

  // marginals = {sum T, sum (1 - T)} over the finite entries; valid in warp 0.
  __device__ __forceinline__ void marginals(Team& team, const Argument<Compute>& argument,
                                            double (&marginals)[2]) const {
    ThreadMarginals<Compute> part;
    for_each_pack([&](int, const Compute* x) { part.add(argument, x); });
    marginals[0] = part.T.total();
    marginals[1] = part.U.total();
    team.reduce<2>(marginals);
  }

  // Writes the weights of the slice, zeros in the padding; returns their sums before scaling, valid in warp 0.
  __device__ __forceinline__ SigmoidSums write_weights(Team& team, const Plan<Compute>& plan,
                                                       const MatrixRow<Compute>& output) const {
    const bool vectorised = output.aligned();
    ThreadTotal<Compute> part;
    for_each_pack([&](int column, const Compute* x) {
      Compute T[kWidth];
      part.add(plan.argument, x, T);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        T[j] = plan.saturated ? Row<Compute>::filled(plan.fill, x[j], row_.valid(column + j)) : T[j] * plan.scale;
      }
      output.typed([&](auto* data) { store_pack(data, row_.cols, vectorised, [&](int j) { return column + j; }, T); });
    });
    double values[] = {static_cast<double>(part.upper), part.d.total()};
    team.reduce<2>(values);
    SigmoidSums sums;
    sums.upper = values[0];
    sums.d = values[1];
    return sums;
  }

 private:
  static constexpr int kSpan = team_span(sizeof(Compute));

  // Position in the span of this thread's pack `b`: neighbouring threads have neighbouring packs.
  static __device__ __forceinline__ int offset(int b) {
    return (b * kLongThreads + static_cast<int>(threadIdx.x)) * kWidth;
  }

  __device__ __forceinline__ void load_batch(const MatrixRow<Compute>& matrix, bool vectorised, int base,
                                             Compute (&x)[kBatchPacks][kWidth]) const {
    matrix.typed([&](const auto* data) {
#pragma unroll
      for (int b = 0; b < kBatchPacks; ++b) {
        load_pack(data, row_.length, vectorised, [&](int j) { return first_ + base + offset(b) + j; }, x[b]);
      }
    });
  }

  // A batch of the scores from device memory: all its loads are issued before the first use.
  __device__ __forceinline__ void stream(int base, Compute (&x)[kBatchPacks][kWidth]) const {
    load_batch(row_.scores, vectorised_, base, x);
#pragma unroll
    for (int b = 0; b < kBatchPacks; ++b) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) x[b][j] = row_.ordered(x[b][j], row_.valid(first_ + base + offset(b) + j));
    }
  }

  // Leaves out what is past the slice: whole warps skip it.
  template <typename Body>
  __device__ __forceinline__ void for_each_of_batch(int base, const Compute (&x)[kBatchPacks][kWidth],
                                                    Body body) const {
#pragma unroll
    for (int b = 0; b < kBatchPacks; ++b) {
      if (base + offset(b) < count_) body(first_ + base + offset(b), x[b]);
    }
  }

  static __device__ __forceinline__ void copy_pack(const Compute* from, Compute* to) {
    *reinterpret_cast<Pack<Compute, kWidth>*>(to) = *reinterpret_cast<const Pack<Compute, kWidth>*>(from);
  }

  const Row<Compute>& row_;
  bool vectorised_;
  int first_;  // column of the slice
  int count_;  // entries of the slice
  int staged_count_;
  Compute* staged_;
};

}  // namespace mmer
