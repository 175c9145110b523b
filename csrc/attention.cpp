// Attention with soft key weights for the dispatcher: checks, outputs, launch. Schema: mmer_fast/ops/attention_cpu.py.
#include "../kernels/cpu/attention.h"

#include <atomic>
#include <tuple>

#include "tensor.h"

namespace mmer {
namespace {

// (B, heads, tokens, D) with the entries of a token side by side.
struct Tokens {
  Tensor tensor;
  AttentionArray array;
};

Tokens make_tokens(const Tensor& given, const char* name, const Tensor& q) {
  STD_TORCH_CHECK(given.dim() == 4, name, " must have shape (B, heads, tokens, D)");
  STD_TORCH_CHECK(given.scalar_type() == q.scalar_type(), name, " must have the dtype of q");
  STD_TORCH_CHECK(given.size(0) == q.size(0) && given.size(3) == q.size(3), name, " must have the B and D of q");
  const Tensor t = unit_column_stride(given);
  return {t, {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}};
}

// The checked inputs; the tensors keep alive what the view points at.
struct Inputs {
  Tokens q, k, v;
  std::optional<Tensor> weights, lengths, query_lengths, mask;
  AttentionInputs view{};
};

Inputs make_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& key_weights,
                   const std::optional<Tensor>& lengths, const std::optional<Tensor>& query_lengths,
                   const std::optional<Tensor>& mask, const std::optional<Tensor>& bias, bool causal, double scale) {
  Inputs inputs{make_tokens(q, "q", q), make_tokens(k, "k", q),    make_tokens(v, "v", q), contiguous(key_weights),
                contiguous(lengths),    contiguous(query_lengths), contiguous(mask)};
  AttentionInputs& args = inputs.view;
  args.dtype = dtype_of(q, "q");
  STD_TORCH_CHECK(args.dtype != DType::kFloat64, "q must be float32, bfloat16 or float16 on this backend");
  args.q = inputs.q.array;
  args.k = inputs.k.array;
  args.v = inputs.v.array;
  args.batch = q.size(0);
  args.heads = q.size(1);
  args.queries = q.size(2);
  args.width = q.size(3);
  args.key_heads = k.size(1);
  args.keys = k.size(2);
  STD_TORCH_CHECK(v.size(1) == args.key_heads && v.size(2) == args.keys, "v must have the heads and tokens of k");
  STD_TORCH_CHECK(args.key_heads > 0 && args.heads % args.key_heads == 0, "the heads of k must divide those of q");

  const auto& [weights, lengths_b, query_lengths_b, valid] =
      std::tie(inputs.weights, inputs.lengths, inputs.query_lengths, inputs.mask);
  if (weights) {
    const bool per_head = weights->dim() == 3;
    STD_TORCH_CHECK(weights->scalar_type() == ScalarType::Float, "key_weights must be float32");
    STD_TORCH_CHECK((per_head || weights->dim() == 2) && weights->size(0) == args.batch &&
                        weights->size(weights->dim() - 1) == args.keys && (!per_head || weights->size(1) == args.heads),
                    "key_weights must have shape (B, S) or (B, H, S)");
    args.key_weights = static_cast<const float*>(weights->data_ptr());
    args.weights_batch = weights->stride(0);
    args.weights_head = per_head ? weights->stride(1) : 0;
  }
  if (lengths_b) args.lengths = row_vector<int64_t>(*lengths_b, "lengths", ScalarType::Long, q);
  if (query_lengths_b) args.query_lengths = row_vector<int64_t>(*query_lengths_b, "query_lengths", ScalarType::Long, q);
  if (valid) {
    STD_TORCH_CHECK(valid->dim() == 2 && valid->size(0) == args.batch && valid->size(1) == args.keys &&
                        valid->scalar_type() == ScalarType::Bool,
                    "mask must be bool of shape (B, S)");
    args.mask = static_cast<const uint8_t*>(valid->data_ptr());
    args.mask_stride = valid->stride(0);
  }
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float, "bias must be float32");
    STD_TORCH_CHECK(bias->dim() == 4 && bias->size(0) == args.batch && bias->size(1) == args.heads &&
                        bias->size(2) == args.queries && bias->size(3) == args.keys,
                    "bias must have shape (B, H, L, S)");
    args.bias = static_cast<const float*>(bias->data_ptr());
    args.bias_batch = bias->stride(0);
    args.bias_head = bias->stride(1);
    args.bias_query = bias->stride(2);
    args.bias_key = bias->stride(3);
  }
  args.causal = causal;
  args.scale = scale;

  return inputs;
}

// Samples differ in length: every thread takes the next few tasks until none is left. Who computes a task does not
// change its result.
template <class Args, class Kernel>
void run(const Args& args, int64_t tasks, Kernel kernel) {
  const int64_t few = tasks / 32 > 1 ? tasks / 32 : 1;
  std::atomic<int64_t> next{0};
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    for (int64_t first; (first = next.fetch_add(few)) < tasks;) {
      const int64_t last = first + few < tasks ? first + few : tasks;
      if (!kernel(args, first, last)) ok.store(false, std::memory_order_relaxed);
    }
  });
  STD_TORCH_CHECK(ok.load(), "attention: no memory for the scratch of ", args.in.keys, " keys");
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const std::optional<Tensor>& key_weights, const std::optional<Tensor>& lengths,
                                   const std::optional<Tensor>& query_lengths, const std::optional<Tensor>& mask,
                                   const std::optional<Tensor>& bias, bool causal, double scale) {
  const Inputs inputs = make_inputs(q, k, v, key_weights, lengths, query_lengths, mask, bias, causal, scale);
  const AttentionInputs& in = inputs.view;
  Tensor out = empty(q, {in.batch, in.heads, in.queries, in.width}, q.scalar_type());
  Tensor lse = empty(q, {in.batch, in.heads, in.queries}, ScalarType::Float);
  const AttentionForwardArgs args{in, out.data_ptr(), static_cast<float*>(lse.data_ptr())};
  run(args, attention_cpu_forward_tasks(in), attention_forward_cpu);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& out, const Tensor& lse,
                                                    const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const std::optional<Tensor>& key_weights,
                                                    const std::optional<Tensor>& lengths,
                                                    const std::optional<Tensor>& query_lengths,
                                                    const std::optional<Tensor>& mask,
                                                    const std::optional<Tensor>& bias, bool causal, double scale) {
  const Inputs inputs = make_inputs(q, k, v, key_weights, lengths, query_lengths, mask, bias, causal, scale);
  const AttentionInputs& in = inputs.view;
  const Tokens grad = make_tokens(grad_out, "grad_out", q), output = make_tokens(out, "out", q);
  for (const Tensor& tensor : {grad_out, out}) {
    STD_TORCH_CHECK(tensor.size(1) == in.heads && tensor.size(2) == in.queries,
                    "grad_out and out must have the shape of q");
  }
  const Tensor sums = torch::stable::contiguous(lse);
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Float && sums.numel() == in.batch * in.heads * in.queries,
                  "lse must be float32 of shape (B, H, L)");
  Tensor grad_q = empty(q, {in.batch, in.heads, in.queries, in.width}, q.scalar_type());
  Tensor grad_k = empty(q, {in.batch, in.key_heads, in.keys, in.width}, q.scalar_type());
  Tensor grad_v = empty(q, {in.batch, in.key_heads, in.keys, in.width}, q.scalar_type());
  Tensor grad_weights = empty(q, {in.batch, in.heads, inputs.weights ? in.keys : 0}, ScalarType::Float);
  const AttentionBackwardArgs args{in,
                                   grad.array,
                                   output.array,
                                   static_cast<const float*>(sums.data_ptr()),
                                   grad_q.data_ptr(),
                                   grad_k.data_ptr(),
                                   grad_v.data_ptr(),
                                   inputs.weights ? static_cast<float*>(grad_weights.data_ptr()) : nullptr};
  run(args, attention_cpu_backward_tasks(in), attention_backward_cpu);
  return {grad_q, grad_k, grad_v, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmer_fast, CPU, library) {
  library.impl("attention_forward", TORCH_BOX(&forward));
  library.impl("attention_backward", TORCH_BOX(&backward));
}

}  // namespace mmer
