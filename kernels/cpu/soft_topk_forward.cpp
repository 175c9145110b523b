// Soft top-k forward:   T_i = sigma((x_i - lambda)/tau),   sum_i T_i = k,   x = sign * s
//
// common/soft_topk_solver.h decides what the sweeps are for. Its scalar half is one long chain of dependent operations,
// so a task keeps several rows in flight: while the chain of one row waits, the next row's runs.
#include "soft_topk_select.h"
#include "soft_topk_sweeps.h"

namespace mmer {
inline namespace MMER_VARIANT {
namespace {

constexpr int kMostInFlight = 8;
constexpr int kBuffers = 3;                  // x, q and T of a row
constexpr int64_t kInFlightBytes = 1 << 15;  // scratch of the rows in flight should stay in the first-level cache

template <class C>
int rows_in_flight(int64_t cols, int64_t rows) {
  const int64_t row_bytes = kBuffers * whole_vectors<C>(cols > 0 ? cols : 1) * static_cast<int64_t>(sizeof(C));
  int64_t count = kInFlightBytes / row_bytes;
  count = count < rows ? count : rows;
  return static_cast<int>(count < 1 ? 1 : (count > kMostInFlight ? kMostInFlight : count));
}

template <class S>
class Row {
 public:
  using C = typename ComputeOf<S>::type;
  using Action = ThresholdSolver::Action;
  static constexpr bool kFloat = sizeof(C) == 4;

  bool pending() const { return action_ != Action::kOutput; }

  void stage(const SoftTopKForwardArgs& args, int64_t row, const Scratch<C>& scratch, int slot) {
    args_ = &args;
    row_ = row;
    length_ = row_length(args.in, row);
    const StagedRow<C> staged = stage_scores<S, C>(args.in, row, length_, scratch.buffer(kBuffers * slot));
    x_ = staged.x;
    stats_ = row_stats(x_, length_, staged.valid);
    sweeper_ =
        Sweeper<C>(x_, length_, scratch.buffer(kBuffers * slot + 1), weights(scratch.buffer(kBuffers * slot + 2)));
  }

  void start() {
    solver_ = ThresholdSolver();
    factor_ = 1.0;
    if (args_->sinkhorn_iterations > 0) {
      solver_.start_sinkhorn(stats_, k(), tau(), sign());
      iterate_sinkhorn();
      action_ = Action::kOutput;
    } else {
      action_ = solver_.start(stats_, k(), tau(), kFloat);
    }
  }

  // What the solver asked for: a sweep, or the selection.
  void sweep() {
    if (action_ == Action::kSweep) {
      sums_ = sweeper_.sums(solver_);
    } else if (action_ == Action::kSelect) {
      const int64_t rank = static_cast<int64_t>(ThresholdSolver::selection_rank(k()));
      selection_ = select(x_, length_, rank, solver_.tau, solver_.sweeps);
    }
  }

  void solve() {
    if (action_ == Action::kSweep) {
      action_ = solver_.after_sweep(sums_, kFloat);
    } else if (action_ == Action::kSelect) {
      action_ = solver_.after_selection(selection_, kFloat);
    }
  }

  void write() const {
    S* const out = this->out();
    store_zeros(out, length_, args_->in.cols);
    double residual;
    if (solver_.saturated) {
      write_saturated(out);
      residual = solver_.fill * stats_.finite - k();
    } else {
      const double total = write_moved(out);
      residual = args_->sinkhorn_iterations > 0 ? solver_.sinkhorn_residual(total) : total - k();
    }
    args_->threshold[row_] = sign() * solver_.threshold();
    args_->certificate[2 * row_] = residual;
    args_->certificate[2 * row_ + 1] = args_->in.cols > 0 ? solver_.sweeps : 0;
  }

 private:
  double k() const { return args_->k != nullptr ? args_->k[row_] : args_->k_value; }
  double tau() const {
    return usable_tau(args_->in.tau != nullptr ? args_->in.tau[row_] : args_->in.tau_value, kFloat);
  }
  double sign() const { return args_->in.largest ? 1.0 : -1.0; }
  S* out() const { return static_cast<S*>(args_->weights) + row_ * args_->in.cols; }

  // Where sweeps write T: the output itself, where whole vectors of it belong to the row, else scratch.
  C* weights(C* scratch) const {
    if constexpr (sizeof(S) == sizeof(C)) {
      if (whole_vectors<C>(length_) == length_) return out();
    }
    return scratch;
  }

  void iterate_sinkhorn() {
    for (int64_t t = 0; t < args_->sinkhorn_iterations && !solver_.saturated; ++t) {
      double sum_T, sum_U;
      sweeper_.sinkhorn(solver_, &sum_T, &sum_U);
      factor_ = k() / sum_T;
      if (t + 1 < args_->sinkhorn_iterations) solver_.sinkhorn_step(sum_T, sum_U, stats_);
    }
  }

  double write_moved(S* out) const {
    const C* const T = sweeper_.weights();
    const C factor = static_cast<C>(factor_);
    const double d = solver_.last_step;
    if (std::fabs(d) <= solver_.final_step) return write_weights(T, length_, MovedLittle<C>(d), factor, out);
    return write_weights(T, length_, Moved<C>(d), factor, out);
  }

  // A row without a root: every finite entry gets solver.fill, 0 or 1, or every valid one NaN.
  void write_saturated(S* out) const {
    const C fill = static_cast<C>(solver_.fill);
    if (fill == fill) {
      const C* const x = x_;
      store_row<C>(out, 0, whole_vectors<C>(length_), length_,
                   [=](int64_t i) MMER_INLINE_LAMBDA { return where(load(x + i) > -infinity<C>(), broadcast(fill)); });
      return;
    }
    const SoftTopKRows& in = args_->in;
    for (int64_t i = 0; i < length_; ++i) {
      const bool valid = in.mask == nullptr || in.mask[row_ * in.mask_stride + i] != 0;
      from_compute(valid ? fill : C(0), out + i);
    }
  }

  const SoftTopKForwardArgs* args_ = nullptr;
  int64_t row_ = 0, length_ = 0;
  const C* x_ = nullptr;
  RowStats stats_;
  Sweeper<C> sweeper_;
  ThresholdSolver solver_;
  SigmoidSums sums_;
  Selection selection_;
  Action action_ = Action::kOutput;
  double factor_ = 1.0;
};

template <class S>
bool forward_rows(const SoftTopKForwardArgs& args, int64_t begin, int64_t end) {
  using C = typename ComputeOf<S>::type;
  const int in_flight = rows_in_flight<C>(args.in.cols, end - begin);
  const Scratch<C> scratch(args.in.cols, kBuffers * in_flight);
  if (!scratch.ok()) return false;
  Row<S> rows[kMostInFlight];
  for (int64_t first = begin; first < end; first += in_flight) {
    const int count = static_cast<int>(end - first < in_flight ? end - first : in_flight);
    for (int j = 0; j < count; ++j) rows[j].stage(args, first + j, scratch, j);
    for (int j = 0; j < count; ++j) rows[j].start();
    for (bool pending = true; pending;) {
      pending = false;
      for (int j = 0; j < count; ++j) rows[j].sweep();
      for (int j = 0; j < count; ++j) {
        rows[j].solve();
        pending |= rows[j].pending();
      }
    }
    for (int j = 0; j < count; ++j) rows[j].write();
  }
  return true;
}

}  // namespace

bool soft_topk_forward_rows(const SoftTopKForwardArgs& args, int64_t begin, int64_t end) {
  return by_storage(args.in.dtype, [&](auto storage) { return forward_rows<decltype(storage)>(args, begin, end); });
}

}  // namespace MMER_VARIANT
}  // namespace mmer
