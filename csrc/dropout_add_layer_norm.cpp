// Dropout, residual and LayerNorm for the dispatcher: checks, outputs, launch. Schemas:
// mmer_fast/ops/dropout_add_layer_norm.py.
#include <atomic>
#include <tuple>

#include "dropout.h"

namespace mmer {
namespace {

struct Inputs {
  Tensor x, residual, weight;
  MaybeTensor x_bias;
  DropoutNormInputs view{};
};

Inputs make_inputs(const Tensor& x, const MaybeTensor& x_bias, const Tensor& residual, const Tensor& weight, double p,
                   const MaybeTensor& seed) {
  check_like(residual, "residual", x);
  Inputs inputs{torch::stable::contiguous(x), torch::stable::contiguous(residual), wide_row(weight, "weight", x),
                wide_row(x_bias, "x_bias", x)};
  const int64_t cols = columns(x);
  inputs.view = {dtype_of(x, "x"),
                 x.numel() / cols,
                 cols,
                 inputs.x.data_ptr(),
                 data_or_null(inputs.x_bias),
                 inputs.residual.data_ptr(),
                 inputs.weight.data_ptr(),
                 draw_of(p, seed, x)};
  return inputs;
}

template <class Args>
void run_on_cpu(const Args& args, int64_t tasks, int64_t grain, bool (*kernel)(const Args&, int64_t, int64_t)) {
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    if (!kernel(args, begin, end)) ok.store(false, std::memory_order_relaxed);
  });
  STD_TORCH_CHECK(ok.load(), "dropout_add_layer_norm: no memory for the scratch of a row of ", args.in.cols,
                  " entries");
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const MaybeTensor& x_bias, const Tensor& residual,
                                   const Tensor& weight, const Tensor& bias, double eps, double p,
                                   const MaybeTensor& seed) {
  const Inputs inputs = make_inputs(x, x_bias, residual, weight, p, seed);
  const Tensor bias_row = wide_row(bias, "bias", x);
  const Tensor y = contiguous_like(x), moments = empty(x, {inputs.view.rows, 2}, wide_type(x));
  const DropoutNormForwardArgs args{inputs.view, bias_row.data_ptr(), eps, y.data_ptr(), moments.data_ptr()};
  run_on_cpu(args, args.in.rows, dropout_cpu_grain(args.in.cols), dropout_norm_forward_cpu);
  return {y, moments};
}

// grad_x is empty where p is 0: it is grad_residual.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                                            const MaybeTensor& x_bias, const Tensor& residual,
                                                            const Tensor& weight, const Tensor& moments, double p,
                                                            const MaybeTensor& seed) {
  const Inputs inputs = make_inputs(x, x_bias, residual, weight, p, seed);
  check_like(grad, "grad", x);
  STD_TORCH_CHECK(moments.dim() == 2 && moments.size(0) == inputs.view.rows && moments.size(1) == 2 &&
                      moments.scalar_type() == wide_type(x) && moments.is_contiguous(),
                  "moments must be those of the forward pass");
  const Tensor grad_rows = torch::stable::contiguous(grad), grad_residual = contiguous_like(x);
  const Tensor grad_x = p > 0 ? contiguous_like(x) : empty(x, {0}, x.scalar_type());
  const RowSums sums(x, inputs.view.rows, 3);
  const DropoutNormBackwardArgs args{inputs.view,
                                     grad_rows.data_ptr(),
                                     moments.data_ptr(),
                                     p > 0 ? grad_x.data_ptr() : nullptr,
                                     grad_residual.data_ptr(),
                                     sums.parts()};
  run_on_cpu(args, sums.chunks(), 1, dropout_norm_backward_cpu);
  return {grad_x, sums.total(0), grad_residual, sums.total(1), sums.total(2)};
}

}  // namespace

MMER_IMPLEMENT(CPU, library) {
  library.impl("dropout_add_layer_norm", TORCH_BOX(&forward));
  library.impl("dropout_add_layer_norm_backward", TORCH_BOX(&backward));
}

}  // namespace mmer
