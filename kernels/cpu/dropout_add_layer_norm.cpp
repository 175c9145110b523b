// Dropout, residual and LayerNorm of a row, and their gradients with the mask drawn again:
//
//     s = residual + mask (x + x_bias),   y = xhat weight + bias,   xhat = (s - mean) rstd
//
//     a = grad weight,   grad_s = rstd (a - mean(a) - xhat mean(a xhat)),   grad_residual = grad_s
//     grad_x = mask grad_s,   grad_x_bias = sum grad_x,   grad_weight = sum grad xhat,   grad_bias = sum grad
//
// The backward pass reads x and residual again, of which the layers around keep the second anyway: a copy of s would
// be written once more and be no less to read.
#include <cmath>

#include "dropout.h"
#include "dropout_draws.h"

namespace mmer {
inline namespace MMER_VARIANT {
namespace {

// The sum over a row of whole vectors of what `entries(i)` gives for vector i.
template <class C, class Entries>
MMER_INLINE double sum_of(int64_t cols, Entries entries) {
  Accumulator<C> sum;
  for (int64_t i = 0; i < cols; i += Vec<C>::kLanes) sum.add(entries(i));
  return sum.total();
}

template <class C>
void fill_end(C* row, int64_t cols, C value) {
  for (int64_t j = cols; j < whole_vectors<C>(cols); ++j) row[j] = value;
}

// What both passes do to a row.
template <class S>
class Rows {
 public:
  using C = typename ComputeOf<S>::type;

  explicit Rows(const DropoutNormInputs& in)
      : in_(in), drops_(in.draw.seed != nullptr), draws_(in.draw, in.cols), x_bias_(in.x_bias, in.cols) {}

  bool ok() const { return draws_.ok() && x_bias_.ok(); }

  // s of a row.
  void sums(int64_t row, C* __restrict__ s) {
    const int64_t first = row * in_.cols;
    const S *x = at(in_.x, row), *residual = at(in_.residual, row);
    const C* bias = x_bias_.data();
    if (!drops_) {
      for (int64_t j = 0; j < in_.cols; ++j) s[j] = to_compute(residual[j]) + (to_compute(x[j]) + bias[j]);
      return;
    }
    draws_.draw(first, in_.cols);
    const auto mask = draws_.template mask<C>();
    for (int64_t j = 0; j < in_.cols; ++j) s[j] = to_compute(residual[j]) + (to_compute(x[j]) + bias[j]) * mask(j);
  }

  // The mask of the last row that was summed.
  auto mask() const { return draws_.template mask<C>(); }

  const S* at(const void* data, int64_t row) const { return static_cast<const S*>(data) + row * in_.cols; }
  S* at(void* data, int64_t row) const { return static_cast<S*>(data) + row * in_.cols; }

 private:
  const DropoutNormInputs& in_;
  const bool drops_;
  DropoutDraws draws_;
  RowOrZeros<C> x_bias_;
};

template <class S>
bool forward(const DropoutNormForwardArgs& args, int64_t begin, int64_t end) {
  using C = typename ComputeOf<S>::type;
  const int64_t cols = args.in.cols;
  Rows<S> rows(args.in);
  const Scratch<C> scratch(cols, 1);
  if (!rows.ok() || !scratch.ok()) return false;
  const C *weight = static_cast<const C*>(args.in.weight), *bias = static_cast<const C*>(args.bias);
  C* s = scratch.buffer(0);
  for (int64_t row = begin; row < end; ++row) {
    rows.sums(row, s);
    fill_end(s, cols, C(0));
    const C mean = static_cast<C>(sum_of<C>(cols, [&](int64_t i) MMER_INLINE_LAMBDA { return load(s + i); }) / cols);
    fill_end(s, cols, mean);
    const double squares = sum_of<C>(cols, [&](int64_t i) MMER_INLINE_LAMBDA {
      const Vec<C> d = load(s + i) - mean;
      return d * d;
    });
    const C rstd = static_cast<C>(1 / std::sqrt(squares / cols + args.eps));
    S* __restrict__ y = rows.at(args.y, row);
    for (int64_t j = 0; j < cols; ++j) from_compute((s[j] - mean) * rstd * weight[j] + bias[j], y + j);
    C* moments = static_cast<C*>(args.moments) + 2 * row;
    moments[0] = mean;
    moments[1] = rstd;
  }
  return true;
}

template <class S>
class Backward {
 public:
  using C = typename ComputeOf<S>::type;

  explicit Backward(const DropoutNormBackwardArgs& args) : args_(args), rows_(args.in), scratch_(args.in.cols, 2) {}

  bool ok() const { return rows_.ok() && scratch_.ok(); }

  void chunk(int64_t index) {
    const int64_t rows = args_.in.rows, step = sum_chunk_rows(rows), cols = args_.in.cols;
    C* sums = static_cast<C*>(args_.sums) + 3 * index * cols;
    for (int64_t j = 0; j < 3 * cols; ++j) sums[j] = 0;
    const int64_t last = (index + 1) * step < rows ? (index + 1) * step : rows;
    for (int64_t row = index * step; row < last; ++row) {
      const C* moments = static_cast<const C*>(args_.moments) + 2 * row;
      normalise(row, moments[0], moments[1], sums + cols, sums + 2 * cols);
      write(row, moments[1], sums);
    }
  }

 private:
  // xhat and a of a row into scratch; adds to grad_weight and grad_bias.
  void normalise(int64_t row, C mean, C rstd, C* __restrict__ grad_weight, C* __restrict__ grad_bias) {
    C* __restrict__ xhat = scratch_.buffer(0), * __restrict__ a = scratch_.buffer(1);
    const int64_t cols = args_.in.cols;
    const S* grad = rows_.at(args_.grad, row);
    const C* weight = static_cast<const C*>(args_.in.weight);
    rows_.sums(row, xhat);
    for (int64_t j = 0; j < cols; ++j) {
      const C g = to_compute(grad[j]);
      xhat[j] = (xhat[j] - mean) * rstd;
      a[j] = g * weight[j];
      grad_weight[j] += g * xhat[j];
      grad_bias[j] += g;
    }
    fill_end(xhat, cols, C(0));
    fill_end(a, cols, C(0));
  }

  // The gradients of a row from scratch; adds to grad_x_bias.
  void write(int64_t row, C rstd, C* __restrict__ grad_x_bias) {
    const C *xhat = scratch_.buffer(0), *a = scratch_.buffer(1);
    const int64_t cols = args_.in.cols;
    const C a_mean = static_cast<C>(sum_of<C>(cols, [&](int64_t i) MMER_INLINE_LAMBDA { return load(a + i); }) / cols);
    const C a_xhat_mean = static_cast<C>(
        sum_of<C>(cols, [&](int64_t i) MMER_INLINE_LAMBDA { return load(a + i) * load(xhat + i); }) / cols);
    const auto grad_s = [=](int64_t j) MMER_INLINE_LAMBDA { return rstd * (a[j] - a_mean - xhat[j] * a_xhat_mean); };
    S* __restrict__ grad_residual = rows_.at(args_.grad_residual, row);
    if (args_.grad_x == nullptr) {
      for (int64_t j = 0; j < cols; ++j) {
        const C g = grad_s(j);
        from_compute(g, grad_residual + j);
        grad_x_bias[j] += g;
      }
      return;
    }
    S* __restrict__ grad_x = rows_.at(args_.grad_x, row);
    const auto mask = rows_.mask();
    for (int64_t j = 0; j < cols; ++j) {
      const C g = grad_s(j), kept = g * mask(j);
      from_compute(g, grad_residual + j);
      from_compute(kept, grad_x + j);
      grad_x_bias[j] += kept;
    }
  }

  const DropoutNormBackwardArgs& args_;
  Rows<S> rows_;
  Scratch<C> scratch_;
};

}  // namespace

bool dropout_norm_forward_rows(const DropoutNormForwardArgs& args, int64_t begin, int64_t end) {
  return by_storage(args.in.dtype, [&](auto storage) { return forward<decltype(storage)>(args, begin, end); });
}

bool dropout_norm_backward_chunks(const DropoutNormBackwardArgs& args, int64_t begin, int64_t end) {
  return by_storage(args.in.dtype, [&](auto storage) {
    Backward<decltype(storage)> backward(args);
    if (!backward.ok()) return false;
    for (int64_t chunk = begin; chunk < end; ++chunk) backward.chunk(chunk);
    return true;
  });
}

}  // namespace MMER_VARIANT
}  // namespace mmer
