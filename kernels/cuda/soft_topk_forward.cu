// Forward soft top-k on the device:
//
//     T_i = sigma(sign (s_i - lambda) / tau),   lambda such that sum_i T_i = k
//
// Rows of up to 1024 entries: a group of lanes a row, entries in registers (soft_topk_lanes.cuh). Longer rows, and the
// Sinkhorn recursion: a block or a cluster of blocks a row (soft_topk_team.cuh). Both drive ThresholdSolver with the
// same sequence of calls as the CPU kernel does.
#include "soft_topk.h"
#include "soft_topk_lanes.cuh"
#include "soft_topk_launch.cuh"
#include "soft_topk_long_row.cuh"
#include "soft_topk_select.cuh"

namespace mmer {
namespace {

using Action = ThresholdSolver::Action;

template <typename Compute>
inline constexpr bool kInFloat = sizeof(Compute) == 4;

__device__ __forceinline__ double row_k(const SoftTopKForwardArgs& args, int64_t row) {
  if (row >= args.in.rows) return 0.0;
  return args.k != nullptr ? args.k[row] : args.k_value;
}

// The certificate of a row without a root: a plan cannot take more than all finite entries.
__device__ __forceinline__ double saturated_residual(const ThresholdSolver& solver) {
  if (solver.fill != solver.fill) return NAN;
  return solver.k > solver.n ? solver.n - solver.k : 0.0;
}

// `measured`: the sums of the output sweep, before any Sinkhorn scaling.
__device__ __forceinline__ void write_certificate(const SoftTopKForwardArgs& args, int64_t row,
                                                  const ThresholdSolver& solver, double sign,
                                                  const SigmoidSums& measured) {
  args.threshold[row] = sign * solver.threshold();
  double residual = measured.residual(solver.k);
  if (args.sinkhorn_iterations > 0) residual = solver.sinkhorn_residual(measured.upper + measured.d);
  args.certificate[2 * row] = solver.saturated ? saturated_residual(solver) : residual;
  args.certificate[2 * row + 1] = args.in.cols > 0 ? solver.sweeps + (solver.saturated ? 0 : 1) : 0;
}

template <typename Compute>
__device__ __forceinline__ Argument<Compute> argument_of(const ThresholdSolver& solver, Compute inverse_tau) {
  return {static_cast<Compute>(solver.pivot), inverse_tau, static_cast<Compute>(solver.c)};
}

// ---- Short rows ----------------------------------------------------------------------------------------------------

// Drives the solver to Action::kOutput. The rows of a warp may ask for different things: each round serves them all.
template <typename Compute, int kLanes, int kItems>
__device__ __forceinline__ void solve_short(const LaneRow<Compute, kLanes, kItems>& entries, const RowStats& stats,
                                            ThresholdSolver& solver, Action action, Compute inverse_tau) {
  while (__any_sync(kFullWarp, action != Action::kOutput)) {
    const bool selecting = action == Action::kSelect;
    if (__any_sync(kFullWarp, selecting)) {
      const int rank = selecting ? static_cast<int>(ThresholdSolver::selection_rank(solver.k)) : 0;
      const Selection selection = entries.select(rank, stats, selecting);
      if (selecting) action = solver.after_selection(selection, kInFloat<Compute>);
    }
    const SigmoidSums sums = entries.sigmoids(argument_of(solver, inverse_tau));
    if (action == Action::kSweep) action = solver.after_sweep(sums, kInFloat<Compute>);
  }
}

template <typename Compute, int kLanes, int kItems>
__global__ void __launch_bounds__(kShortThreads, short_blocks(sizeof(Compute) * kItems))
    soft_topk_forward_short(const SoftTopKForwardArgs args) {
  using Entries = LaneRow<Compute, kLanes, kItems>;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool live = row < args.in.rows;
  const Row<Compute> input(args.in, row);
  const MatrixRow<Compute> output(args.weights, row, args.in.cols, args.in.dtype);
  const bool vectorised = input.scores.aligned() && output.aligned();

  Entries entries;
  entries.load(input, lane, vectorised);
  const RowStats stats = entries.stats();
  ThresholdSolver solver;
  const Action action = solver.start(stats, row_k(args, row), input.tau, kInFloat<Compute>);
  const Compute inverse_tau = inverse_temperature<Compute>(input.tau);
  solve_short(entries, stats, solver, action, inverse_tau);

  const Argument<Compute> argument = argument_of(solver, inverse_tau);
  const Compute fill = static_cast<Compute>(solver.fill);
  ThreadTotal<Compute> part;
#pragma unroll
  for (int pack = 0; pack < Entries::kPacks; ++pack) {
    Compute* const x = &entries.x[pack * Entries::kWidth];
    Compute T[Entries::kWidth];
    part.add(argument, x, T);
#pragma unroll
    for (int j = 0; j < Entries::kWidth; ++j) {
      const bool valid = entries.valid >> (pack * Entries::kWidth + j) & 1u;
      x[j] = solver.saturated ? Row<Compute>::filled(fill, x[j], valid) : T[j];
    }
  }
  if (live) store_lane_values<kLanes, Entries::kPacks>(output, input.cols, lane, vectorised, entries.x);
  SigmoidSums measured;
  measured.upper = Lanes<kLanes>::count(part.upper);
  measured.d = Lanes<kLanes>::sum(part.d.total());
  if (live && lane == 0) write_certificate(args, row, solver, input.sign, measured);
}

// ---- Long rows -----------------------------------------------------------------------------------------------------

// A block's shared memory; nothing in it is initialised. The solver is there to leave the registers to the sweeps.
template <typename Compute>
struct ForwardShared {
  TeamScratch scratch;
  Histogram histogram;
  Plan<Compute> plan;
  ThresholdSolver solver;  // of thread 0, like the statistics
  RowStats stats;
};

template <typename Compute>
__device__ __forceinline__ Plan<Compute> plan_of(const ThresholdSolver& solver, Action action, Compute inverse_tau,
                                                 double scale = 1.0) {
  return {argument_of(solver, inverse_tau), static_cast<Compute>(scale), static_cast<Compute>(solver.fill),
          solver.saturated, action};
}

// Between this read and the next write of the plan lies a barrier: every turn of the loops below reduces something.
template <typename Compute>
__device__ __forceinline__ Plan<Compute> receive(const Plan<Compute>& shared) {
  __syncthreads();
  return shared;
}

// One block of the shape.ranks that share a row. Thread 0 of each runs the solver on the same sums, hence alike.
template <typename Compute>
__global__ void __launch_bounds__(kLongThreads, kLongBlocks)
    soft_topk_forward_long(const SoftTopKForwardArgs args, const TeamShape shape) {
  static_assert(sizeof(ForwardShared<Compute>) <= kFixedShared, "the launch reserves too little");
  ForwardShared<Compute>& shared = *reinterpret_cast<ForwardShared<Compute>*>(block_shared());
  const int64_t row = blockIdx.x / static_cast<unsigned>(shape.ranks);
  const int64_t iterations = args.sinkhorn_iterations;
  Team team(shared.scratch, shape.ranks);
  const Row<Compute> input(args.in, row);
  const LongRow<Compute> entries(input, shape, team.rank(), reinterpret_cast<Compute*>(block_shared() + kFixedShared));
  const double k = row_k(args, row);
  const Compute inverse_tau = inverse_temperature<Compute>(input.tau);
  const bool solves = threadIdx.x == 0;
  ThresholdSolver& solver = shared.solver;

  const RowStats measured_stats = entries.stage_and_measure(team);
  if (solves) {
    shared.stats = measured_stats;
    solver = ThresholdSolver();
    const Action action = iterations > 0 ? solver.start_sinkhorn(shared.stats, k, input.tau, input.sign)
                                         : solver.start(shared.stats, k, input.tau, kInFloat<Compute>);
    shared.plan = plan_of(solver, action, inverse_tau);
  }
  Plan<Compute> plan = receive(shared.plan);

  for (int64_t i = 0; i < iterations && !plan.saturated; ++i) {
    double marginals[2];
    entries.marginals(team, plan.argument, marginals);
    if (solves) {
      if (i + 1 < iterations) solver.sinkhorn_step(marginals[0], marginals[1], shared.stats);
      shared.plan = plan_of(solver, Action::kOutput, inverse_tau, k / marginals[0]);
    }
    plan = receive(shared.plan);
  }
  while (iterations == 0 && plan.action != Action::kOutput) {
    Action action = Action::kOutput;
    if (plan.action == Action::kSelect) {
      const int rank = static_cast<int>(ThresholdSolver::selection_rank(k));
      const Selection selection = select_by_radix(entries, team, shared.histogram, rank);
      if (solves) {
        action = solver.after_selection(selection, kInFloat<Compute>);
        solver.sweeps += kExtraSelectionSweeps<Compute>;
      }
    } else {
      const SigmoidSums sums = entries.sigmoids(team, plan.argument);
      if (solves) action = solver.after_sweep(sums, kInFloat<Compute>);
    }
    if (solves) shared.plan = plan_of(solver, action, inverse_tau);
    plan = receive(shared.plan);
  }

  const MatrixRow<Compute> output(args.weights, row, args.in.cols, args.in.dtype);
  const SigmoidSums measured = entries.write_weights(team, plan, output);
  if (solves && team.rank() == 0) write_certificate(args, row, solver, input.sign, measured);
  team.leave();
}

// ---- Launches ------------------------------------------------------------------------------------------------------

struct Forward {
  template <typename Compute>
  static cudaError_t launch(const SoftTopKForwardArgs& args, cudaStream_t stream) {
    const bool solves = args.sinkhorn_iterations == 0;  // the Sinkhorn recursion is there to reproduce, not to be fast
    if (solves && args.in.cols <= 128) return launch_short(soft_topk_forward_short<Compute, 8, 16>, args, 8, stream);
    if (solves && args.in.cols <= 512) return launch_short(soft_topk_forward_short<Compute, 32, 16>, args, 32, stream);
    if (solves && args.in.cols <= 1024) return launch_short(soft_topk_forward_short<Compute, 32, 32>, args, 32, stream);
    return launch_long(soft_topk_forward_long<Compute>, args, args.in, sizeof(Compute), stream);
  }
};

}  // namespace

cudaError_t soft_topk_forward_cuda(const SoftTopKForwardArgs& args, cudaStream_t stream) {
  return dispatch_rows<Forward>(args, args.in, stream);
}

}  // namespace mmer
