// Dropout, alone and after a ReLU, drawn again in the backward pass or read off the output:
//
//     out_i = mask_i x_i                      grad_x_i = mask_i grad_i, the same function of the gradient
//     out_i = mask_i max(x_i + bias_i, 0)     grad_x_i = grad_i/(1 - q) where out_i > 0, else 0
//
// A NaN stays one, dropped or not, as in a product with the mask.
#include "dropout.h"

#include "dropout_draws.h"

namespace mmer {
inline namespace MMER_VARIANT {
namespace {

constexpr int64_t kBlock = 1024;  // elements whose draws are made together

template <class S>
bool drop(const DropoutArgs& args, int64_t begin, int64_t end) {
  using C = typename ComputeOf<S>::type;
  DropoutDraws draws(args.draw, kBlock);
  if (!draws.ok()) return false;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = end - first < kBlock ? end - first : kBlock;
    draws.draw(first, count);
    const auto mask = draws.mask<C>();
    const S* x = static_cast<const S*>(args.x) + first;
    S* __restrict__ out = static_cast<S*>(args.out) + first;
    for (int64_t j = 0; j < count; ++j) from_compute(to_compute(x[j]) * mask(j), out + j);
  }
  return true;
}

// max(x, 0), NaN of NaN
template <class C>
MMER_INLINE C relu(C x) {
  return x <= 0 ? C(0) : x;
}

template <class S, class C>
void relu_row(const S* x, const C* bias, int64_t cols, const DropoutDraws* draws, S* __restrict__ out) {
  if (draws == nullptr) {
    for (int64_t j = 0; j < cols; ++j) from_compute(relu(to_compute(x[j]) + bias[j]), out + j);
    return;
  }
  const auto mask = draws->mask<C>();
  for (int64_t j = 0; j < cols; ++j) from_compute(relu(to_compute(x[j]) + bias[j]) * mask(j), out + j);
}

template <class S>
bool relu_drop(const ReluDropoutArgs& args, int64_t begin, int64_t end) {
  using C = typename ComputeOf<S>::type;
  const bool drops = args.draw.seed != nullptr;
  DropoutDraws draws(args.draw, args.cols);
  const RowOrZeros<C> bias(args.bias, args.cols);
  if (!draws.ok() || !bias.ok()) return false;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * args.cols;
    if (drops) draws.draw(first, args.cols);
    relu_row(static_cast<const S*>(args.x) + first, bias.data(), args.cols, drops ? &draws : nullptr,
             static_cast<S*>(args.out) + first);
  }
  return true;
}

template <class S>
void relu_drop_backward(const ReluDropoutBackwardArgs& args, int64_t begin, int64_t end) {
  using C = typename ComputeOf<S>::type;
  const C scale = static_cast<C>(dropout_scale(args.p));
  const int64_t cols = args.cols, step = sum_chunk_rows(args.rows);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    C* __restrict__ sums = static_cast<C*>(args.sums) + chunk * cols;
    for (int64_t j = 0; j < cols; ++j) sums[j] = 0;
    const int64_t last = (chunk + 1) * step < args.rows ? (chunk + 1) * step : args.rows;
    for (int64_t row = chunk * step; row < last; ++row) {
      const S* grad = static_cast<const S*>(args.grad) + row * cols;
      const S* out = static_cast<const S*>(args.out) + row * cols;
      S* __restrict__ grad_x = static_cast<S*>(args.grad_x) + row * cols;
      for (int64_t j = 0; j < cols; ++j) {
        const C g = to_compute(out[j]) <= 0 ? C(0) : to_compute(grad[j]) * scale;
        from_compute(g, grad_x + j);
        sums[j] += g;
      }
    }
  }
}

}  // namespace

bool dropout_elements(const DropoutArgs& args, int64_t begin, int64_t end) {
  return by_storage(args.dtype, [&](auto storage) { return drop<decltype(storage)>(args, begin, end); });
}

bool relu_dropout_rows(const ReluDropoutArgs& args, int64_t begin, int64_t end) {
  return by_storage(args.dtype, [&](auto storage) { return relu_drop<decltype(storage)>(args, begin, end); });
}

void relu_dropout_backward_chunks(const ReluDropoutBackwardArgs& args, int64_t begin, int64_t end) {
  by_storage(args.dtype, [&](auto storage) {
    relu_drop_backward<decltype(storage)>(args, begin, end);
    return true;
  });
}

}  // namespace MMER_VARIANT
}  // namespace mmer
