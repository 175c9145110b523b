// Dropout for the dispatcher, alone and after a ReLU: checks, outputs, launch. Schemas: mmer_fast/ops/dropout.py.
#include "dropout.h"

#include <atomic>
#include <tuple>

namespace mmer {
namespace {

Tensor dropout(const Tensor& x, double p, const Tensor& seed) {
  const Tensor input = torch::stable::contiguous(x);
  const Tensor out = contiguous_like(x);
  const DropoutArgs args{dtype_of(x, "x"), input.data_ptr(), out.data_ptr(), draw_of(p, seed, x)};
  STD_TORCH_CHECK(args.draw.seed != nullptr, "p must be above 0");
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, x.numel(), dropout_cpu_grain(1), [&](int64_t begin, int64_t end) {
    if (!dropout_cpu(args, begin, end)) ok.store(false, std::memory_order_relaxed);
  });
  STD_TORCH_CHECK(ok.load(), "dropout: no memory for its scratch");
  return out;
}

Tensor relu_dropout(const Tensor& x, const MaybeTensor& bias, double p, const MaybeTensor& seed) {
  const int64_t cols = columns(x);
  const Tensor input = torch::stable::contiguous(x);
  const MaybeTensor bias_row = wide_row(bias, "bias", x);
  const Tensor out = contiguous_like(x);
  const ReluDropoutArgs args{dtype_of(x, "x"),       cols,           input.data_ptr(),
                             data_or_null(bias_row), out.data_ptr(), draw_of(p, seed, x)};
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, x.numel() / cols, dropout_cpu_grain(cols), [&](int64_t begin, int64_t end) {
    if (!relu_dropout_cpu(args, begin, end)) ok.store(false, std::memory_order_relaxed);
  });
  STD_TORCH_CHECK(ok.load(), "relu_dropout: no memory for the scratch of a row of ", cols, " entries");
  return out;
}

std::tuple<Tensor, Tensor> relu_dropout_backward(const Tensor& grad, const Tensor& out, double p) {
  const int64_t cols = columns(out), rows = out.numel() / cols;
  check_like(grad, "grad", out);
  STD_TORCH_CHECK(p >= 0 && p < 1, "p must be within [0, 1), got ", p);
  const Tensor grad_rows = torch::stable::contiguous(grad), out_rows = torch::stable::contiguous(out);
  const Tensor grad_x = contiguous_like(out);
  const RowSums sums(out, rows, 1);
  const ReluDropoutBackwardArgs args{
      dtype_of(out, "out"), rows, cols, grad_rows.data_ptr(), out_rows.data_ptr(), p, grad_x.data_ptr(), sums.parts()};
  torch::stable::parallel_for(0, sums.chunks(), 1,
                              [&](int64_t begin, int64_t end) { relu_dropout_backward_cpu(args, begin, end); });
  return {grad_x, sums.total(0)};
}

}  // namespace

MMER_IMPLEMENT(CPU, library) {
  library.impl("dropout", TORCH_BOX(&dropout));
  library.impl("relu_dropout", TORCH_BOX(&relu_dropout));
  library.impl("relu_dropout_backward", TORCH_BOX(&relu_dropout_backward));
}

}  // namespace mmer
