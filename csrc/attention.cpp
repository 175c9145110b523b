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
  const Tensor t = given.size(3) > 1 && given.stride(3) != 1 ? torch::stable::contiguous(given) : given;
  return {t, {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}};
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const std::optional<Tensor>& key_weights, const std::optional<Tensor>& lengths,
                                   const std::optional<Tensor>& query_lengths, const std::optional<Tensor>& mask,
                                   const std::optional<Tensor>& bias, bool causal, double scale) {
  AttentionForwardArgs args{};
  args.dtype = dtype_of(q, "q");
  STD_TORCH_CHECK(args.dtype != DType::kFloat64, "q must be float32, bfloat16 or float16 on this backend");
  const Tokens queries = make_tokens(q, "q", q), keys = make_tokens(k, "k", q), values = make_tokens(v, "v", q);
  args.q = queries.array;
  args.k = keys.array;
  args.v = values.array;
  args.batch = q.size(0);
  args.heads = q.size(1);
  args.queries = q.size(2);
  args.width = q.size(3);
  args.key_heads = k.size(1);
  args.keys = k.size(2);
  STD_TORCH_CHECK(v.size(1) == args.key_heads && v.size(2) == args.keys, "v must have the heads and tokens of k");
  STD_TORCH_CHECK(args.key_heads > 0 && args.heads % args.key_heads == 0, "the heads of k must divide those of q");

  const std::optional<Tensor> weights = contiguous(key_weights), valid = contiguous(mask);
  const std::optional<Tensor> lengths_b = contiguous(lengths), query_lengths_b = contiguous(query_lengths);
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

  Tensor out = empty(q, {args.batch, args.heads, args.queries, args.width}, q.scalar_type());
  Tensor lse = empty(q, {args.batch, args.heads, args.queries}, ScalarType::Float);
  args.out = out.data_ptr();
  args.lse = static_cast<float*>(lse.data_ptr());
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, attention_cpu_tasks(args), 1, [&](int64_t begin, int64_t end) {
    if (!attention_forward_cpu(args, begin, end)) ok.store(false, std::memory_order_relaxed);
  });
  STD_TORCH_CHECK(ok.load(), "attention: no memory for the scratch of ", args.keys, " keys");
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmer_fast, CPU, library) { library.impl("attention_forward", TORCH_BOX(&forward)); }

}  // namespace mmer
