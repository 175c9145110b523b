// Soft top-k for the dispatcher: checks, outputs, launch. Schemas: mmer_fast/ops/soft_topk.py.
#include "../kernels/cpu/soft_topk.h"

#include <atomic>
#include <tuple>

#include "cuda_stream.h"
#include "tensor.h"

#ifdef MMER_WITH_CUDA
#include "../kernels/cuda/soft_topk.h"
#endif

namespace mmer {
namespace {

struct Rows {
  Tensor scores;  // [R, n]
  std::optional<Tensor> tau, lengths, mask;
  SoftTopKRows view{};
};

Rows make_rows(const Tensor& scores, const std::optional<Tensor>& tau, double tau_value,
               const std::optional<Tensor>& lengths, const std::optional<Tensor>& mask, bool largest) {
  STD_TORCH_CHECK(scores.dim() == 2, "scores must have shape (rows, n)");
  const int64_t longest = scores.is_cuda() ? kLongestCudaRow : kLongestRow;
  STD_TORCH_CHECK(scores.size(1) <= longest, "soft_topk: a row may have at most ", longest, " entries");
  Rows rows{unit_column_stride(scores), contiguous(tau), contiguous(lengths), std::nullopt};
  rows.view.dtype = dtype_of(scores, "scores");
  rows.view.rows = scores.size(0);
  rows.view.cols = scores.size(1);
  rows.view.scores = rows.scores.data_ptr();
  rows.view.scores_stride = rows.scores.stride(0);
  rows.view.tau_value = tau_value;
  rows.view.largest = largest;
  if (rows.tau) rows.view.tau = row_vector<double>(*rows.tau, "tau", ScalarType::Double, scores);
  if (rows.lengths) rows.view.lengths = row_vector<int64_t>(*rows.lengths, "lengths", ScalarType::Long, scores);
  if (mask) {
    STD_TORCH_CHECK(mask->dim() == 2 && mask->size(0) == scores.size(0) && mask->size(1) == scores.size(1),
                    "mask must have the shape of scores");
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    STD_TORCH_CHECK(mask->device() == scores.device(), "mask must be on the device of scores");
    rows.mask = unit_column_stride(*mask);
    rows.view.mask = static_cast<const uint8_t*>(rows.mask->data_ptr());
    rows.view.mask_stride = rows.mask->stride(0);
  }
  return rows;
}

template <class Args, class Kernel>
void run_on_cpu(const Args& args, Kernel kernel) {
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, args.in.rows, soft_topk_cpu_grain(args.in.cols), [&](int64_t begin, int64_t end) {
    if (!kernel(args, begin, end)) ok.store(false, std::memory_order_relaxed);
  });
  STD_TORCH_CHECK(ok.load(), "soft_topk: no memory for the scratch of a row of ", args.in.cols, " entries");
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& scores, const std::optional<Tensor>& k, double k_value,
                                           const std::optional<Tensor>& tau, double tau_value,
                                           const std::optional<Tensor>& lengths, const std::optional<Tensor>& mask,
                                           bool largest, int64_t sinkhorn_iterations) {
  const Rows rows = make_rows(scores, tau, tau_value, lengths, mask, largest);
  const std::optional<Tensor> k_rows = contiguous(k);
  const int64_t r = rows.view.rows;
  Tensor weights = empty(scores, {r, rows.view.cols}, scores.scalar_type());
  Tensor threshold = empty(scores, {r}, ScalarType::Double);
  Tensor certificate = empty(scores, {r, 2}, ScalarType::Double);

  SoftTopKForwardArgs args{};
  args.in = rows.view;
  if (k_rows) args.k = row_vector<double>(*k_rows, "k", ScalarType::Double, scores);
  args.k_value = k_value;
  args.sinkhorn_iterations = sinkhorn_iterations;
  args.weights = weights.data_ptr();
  args.threshold = static_cast<double*>(threshold.data_ptr());
  args.certificate = static_cast<double*>(certificate.data_ptr());
#ifdef MMER_WITH_CUDA
  if (scores.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
    check_launch(soft_topk_forward_cuda(args, current_stream(scores)), "soft_topk_forward");
    return {weights, threshold, certificate};
  }
#endif
  run_on_cpu(args, soft_topk_forward_cpu);
  return {weights, threshold, certificate};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_weights, const Tensor& scores, const Tensor& threshold,
                                            const std::optional<Tensor>& grad_threshold,
                                            const std::optional<Tensor>& tau, double tau_value,
                                            const std::optional<Tensor>& lengths, const std::optional<Tensor>& mask,
                                            bool largest) {
  const Rows rows = make_rows(scores, tau, tau_value, lengths, mask, largest);
  STD_TORCH_CHECK(grad_weights.dim() == 2 && grad_weights.size(0) == scores.size(0) &&
                      grad_weights.size(1) == scores.size(1) && grad_weights.scalar_type() == scores.scalar_type(),
                  "grad_weights must have the shape and dtype of scores");
  const Tensor grad = unit_column_stride(grad_weights);
  const Tensor lambda = torch::stable::contiguous(threshold);
  const std::optional<Tensor> grad_lambda = contiguous(grad_threshold);
  const int64_t r = rows.view.rows;
  Tensor grad_scores = empty(scores, {r, rows.view.cols}, scores.scalar_type());
  Tensor grad_k = empty(scores, {r}, ScalarType::Double);
  Tensor grad_tau = empty(scores, {r}, ScalarType::Double);

  SoftTopKBackwardArgs args{};
  args.in = rows.view;
  args.grad_weights = grad.data_ptr();
  args.grad_weights_stride = grad.stride(0);
  args.threshold = row_vector<double>(lambda, "threshold", ScalarType::Double, scores);
  if (grad_lambda) {
    args.grad_threshold = row_vector<double>(*grad_lambda, "grad_threshold", ScalarType::Double, scores);
  }
  args.grad_scores = grad_scores.data_ptr();
  args.grad_k = static_cast<double*>(grad_k.data_ptr());
  args.grad_tau = static_cast<double*>(grad_tau.data_ptr());
#ifdef MMER_WITH_CUDA
  if (scores.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
    check_launch(soft_topk_backward_cuda(args, current_stream(scores)), "soft_topk_backward");
    return {grad_scores, grad_k, grad_tau};
  }
#endif
  run_on_cpu(args, soft_topk_backward_cpu);
  return {grad_scores, grad_k, grad_tau};
}

}  // namespace

MMER_IMPLEMENT(CPU, library) {
  library.impl("soft_topk_forward", TORCH_BOX(&forward));
  library.impl("soft_topk_backward", TORCH_BOX(&backward));
}

#ifdef MMER_WITH_CUDA
MMER_IMPLEMENT(CUDA, library) {
  library.impl("soft_topk_forward", TORCH_BOX(&forward));
  library.impl("soft_topk_backward", TORCH_BOX(&backward));
}
#endif

}  // namespace mmer
