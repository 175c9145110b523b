// Attention with soft key weights for the dispatcher: checks, outputs, launch. Schemas:
// mmer_fast/ops/attention_operators.py, mmer_fast/ops/self_attention.py.
#include "../kernels/cpu/attention.h"

#include <atomic>
#include <memory>
#include <new>
#include <tuple>

#include "cuda_stream.h"
#include "tensor.h"

#ifdef MMER_WITH_CUDA
#include "../kernels/cuda/attention.h"
#endif

namespace mmer {
namespace {

using MaybeTensor = std::optional<Tensor>;

// (B, heads, tokens, D), packed (tokens, heads, D), with the entries of a token side by side.
struct Tokens {
  Tensor tensor;
  AttentionArray array;
};

AttentionArray array_of(const Tensor& t) {
  if (t.dim() == 3) return {t.data_ptr(), 0, t.stride(1), t.stride(0)};
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// (B, heads, tokens), packed (tokens, heads); or without the heads, which share then.
AttentionVector vector_of(const Tensor& t, bool packed) {
  float* data = static_cast<float*>(t.data_ptr());
  if (packed) return {data, 0, t.dim() == 2 ? t.stride(1) : 0, t.stride(0)};
  return {data, t.stride(0), t.dim() == 3 ? t.stride(1) : 0, t.stride(t.dim() - 1)};
}

Tokens make_tokens(const Tensor& given, const char* name, const Tensor& q) {
  STD_TORCH_CHECK(given.dim() == q.dim(), name, " must have as many dimensions as q");
  STD_TORCH_CHECK(given.scalar_type() == q.scalar_type(), name, " must have the dtype of q");
  STD_TORCH_CHECK(given.device() == q.device(), name, " must be on the device of q");
  STD_TORCH_CHECK(given.size(given.dim() - 1) == q.size(q.dim() - 1), name, " must have the head width of q");
  STD_TORCH_CHECK(given.dim() == 3 || given.size(0) == q.size(0), name, " must have the batch size of q");
  const Tensor t = unit_column_stride(given);
  return {t, array_of(t)};
}

void check_same_shape(const Tensor& given, const char* name, const Tensor& like) {
  bool same = given.dim() == like.dim();
  for (int64_t i = 0; same && i < like.dim(); ++i) same = given.size(i) == like.size(i);
  STD_TORCH_CHECK(same, name, " has the wrong shape");
}

// What the dispatcher gives, in the order of the schema.
struct Given {
  const Tensor &q, &k, &v;
  const MaybeTensor &key_weights, &mask, &bias, &lengths, &query_lengths, &cu_seqlens_q, &cu_seqlens_k;
  int64_t max_queries, max_keys;
  bool causal;
  double scale, dropout_p;
  const MaybeTensor& seed;
  bool exact_zero_weight_grad;
};

// The checked inputs; the tensors keep alive what the view points at.
struct Inputs {
  bool packed = false;
  Tokens q, k, v;
  MaybeTensor lengths, query_lengths, cu_seqlens_q, cu_seqlens_k, mask, seed;
  AttentionInputs view{};
};

const int32_t* make_cu_seqlens(const Tensor& cu, const char* name, int64_t tokens, int64_t longest, const Tensor& q) {
  STD_TORCH_CHECK(cu.dim() == 1 && cu.size(0) >= 1 && cu.scalar_type() == ScalarType::Int && cu.is_contiguous(), name,
                  " must be int32 of shape (B + 1,)");
  STD_TORCH_CHECK(cu.device() == q.device(), name, " must be on the device of q");
  const int32_t* ends = static_cast<const int32_t*>(cu.data_ptr());
  if (q.is_cuda()) return ends;  // reading them would wait for the device
  bool holds = ends[0] == 0 && ends[cu.size(0) - 1] == tokens;
  for (int64_t b = 1; b < cu.size(0); ++b) holds = holds && ends[b] >= ends[b - 1] && ends[b] - ends[b - 1] <= longest;
  STD_TORCH_CHECK(holds, name,
                  " must not decrease, go from 0 to the number of tokens, and stay within the longest sample");
  return ends;
}

void set_key_weights(AttentionInputs& args, const Tensor& m, const Tensor& q, bool packed, int64_t tokens) {
  const int64_t last = m.dim() - 1;
  const bool shape = packed ? (last == 0 || (last == 1 && m.size(1) == args.heads)) && m.size(0) == tokens
                            : (last == 1 || (last == 2 && m.size(1) == args.heads)) && m.size(0) == args.batch &&
                                  m.size(last) == args.keys;
  STD_TORCH_CHECK(m.scalar_type() == ScalarType::Float && m.device() == q.device(),
                  "key_weights must be float32 on the device of q");
  STD_TORCH_CHECK(shape, "key_weights must have shape (B, S) or (B, H, S), packed (Tk,) or (Tk, H)");
  args.key_weights = vector_of(m, packed);
}

void set_bias(AttentionInputs& args, const Tensor& bias, const Tensor& q) {
  STD_TORCH_CHECK(bias.scalar_type() == ScalarType::Float && bias.device() == q.device(),
                  "bias must be float32 on the device of q");
  const int64_t full[] = {args.batch, args.heads, args.queries, args.keys};
  bool shape = bias.dim() == 4 && bias.size(3) == args.keys;
  for (int64_t i = 0; shape && i < 3; ++i) shape = bias.size(i) == 1 || bias.size(i) == full[i];
  STD_TORCH_CHECK(shape, "bias must have shape (1|B, 1|H, 1|L, S)");
  args.bias = static_cast<const float*>(bias.data_ptr());
  args.bias_batches = bias.size(0);
  args.bias_heads = bias.size(1);
  args.bias_queries = bias.size(2);
  args.bias_batch = bias.size(0) == 1 ? 0 : bias.stride(0);
  args.bias_head = bias.size(1) == 1 ? 0 : bias.stride(1);
  args.bias_query = bias.size(2) == 1 ? 0 : bias.stride(2);
  args.bias_key = bias.stride(3);
}

Inputs make_inputs(const Given& given) {
  const Tensor& q = given.q;
  STD_TORCH_CHECK(q.dim() == 3 || q.dim() == 4, "q must have shape (B, H, L, D) or (Tq, H, D)");
  Inputs inputs{q.dim() == 3,
                make_tokens(q, "q", q),
                make_tokens(given.k, "k", q),
                make_tokens(given.v, "v", q),
                contiguous(given.lengths),
                contiguous(given.query_lengths),
                contiguous(given.cu_seqlens_q),
                contiguous(given.cu_seqlens_k),
                contiguous(given.mask),
                given.seed};
  const bool packed = inputs.packed;
  const Tensor& k = given.k;
  AttentionInputs& args = inputs.view;
  args.dtype = dtype_of(q, "q");
  STD_TORCH_CHECK(args.dtype != DType::kFloat64, "q must be float32, bfloat16 or float16 on this backend");
  STD_TORCH_CHECK(
      packed == inputs.cu_seqlens_q.has_value() && packed == inputs.cu_seqlens_k.has_value(),
      "cu_seqlens_q and cu_seqlens_k belong to packed q, k and v of shape (tokens, heads, D), and to no other");
  check_same_shape(given.v, "v", k);
  args.batch = packed ? inputs.cu_seqlens_q->size(0) - 1 : q.size(0);
  args.heads = q.size(1);
  args.key_heads = k.size(1);
  args.queries = packed ? given.max_queries : q.size(2);
  args.keys = packed ? given.max_keys : k.size(2);
  args.width = q.size(q.dim() - 1);
  STD_TORCH_CHECK(args.width > 0, "q must have a head width D >= 1");
  STD_TORCH_CHECK(args.queries <= kLongestSample && args.keys <= kLongestSample,
                  "attention: a sample may have at most ", kLongestSample, " tokens");
  STD_TORCH_CHECK(args.key_heads > 0 && args.heads % args.key_heads == 0, "the heads of k must divide those of q");
  args.q = inputs.q.array;
  args.k = inputs.k.array;
  args.v = inputs.v.array;
  if (packed) {
    args.cu_seqlens_q = make_cu_seqlens(*inputs.cu_seqlens_q, "cu_seqlens_q", q.size(0), args.queries, q);
    args.cu_seqlens_k = make_cu_seqlens(*inputs.cu_seqlens_k, "cu_seqlens_k", k.size(0), args.keys, q);
    STD_TORCH_CHECK(inputs.cu_seqlens_k->size(0) == args.batch + 1, "cu_seqlens_k must have the shape of cu_seqlens_q");
    STD_TORCH_CHECK(!given.lengths && !given.query_lengths && !given.mask,
                    "lengths, query_lengths and mask are for padded q, k and v");
  }
  if (given.key_weights) set_key_weights(args, *given.key_weights, q, packed, k.size(0));
  if (given.bias) set_bias(args, *given.bias, q);
  if (inputs.lengths) args.lengths = row_vector<int64_t>(*inputs.lengths, "lengths", ScalarType::Long, q);
  if (inputs.query_lengths) {
    args.query_lengths = row_vector<int64_t>(*inputs.query_lengths, "query_lengths", ScalarType::Long, q);
  }
  if (inputs.mask) {
    const Tensor& mask = *inputs.mask;
    STD_TORCH_CHECK(mask.dim() == 2 && mask.size(0) == args.batch && mask.size(1) == args.keys &&
                        mask.scalar_type() == ScalarType::Bool && mask.device() == q.device(),
                    "mask must be bool of shape (B, S) on the device of q");
    args.mask = static_cast<const uint8_t*>(mask.data_ptr());
    args.mask_batch = mask.stride(0);
  }
  args.causal = given.causal;
  args.scale = given.scale;
  STD_TORCH_CHECK(given.dropout_p >= 0 && given.dropout_p < 1, "dropout_p must be within [0, 1)");
  args.dropout_p = given.dropout_p;
  if (given.dropout_p > 0) {
    STD_TORCH_CHECK(given.seed && given.seed->numel() == 1 && given.seed->scalar_type() == ScalarType::Long &&
                        given.seed->device() == q.device(),
                    "seed must be an int64 tensor of one element on the device of q");
    args.seed = static_cast<const int64_t*>(given.seed->data_ptr());
  }
  args.exact_zero_weight_grad = given.exact_zero_weight_grad;
  return inputs;
}

// Samples differ in length: every thread takes the next few tasks until none is left.
template <class Kernel>
void run_on_cpu(int64_t tasks, int64_t keys, Kernel kernel) {
  const int64_t few = tasks / 32 > 1 ? tasks / 32 : 1;
  std::atomic<int64_t> next{0};
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    for (int64_t first; (first = next.fetch_add(few)) < tasks;) {
      const int64_t last = first + few < tasks ? first + few : tasks;
      if (!kernel(first, last)) ok.store(false, std::memory_order_relaxed);
    }
  });
  STD_TORCH_CHECK(ok.load(), "attention: no memory for the scratch of ", keys, " keys");
}

// `columns`: as in AttentionParts.
void backward_on_cpu(const AttentionBackwardArgs& args, float* columns = nullptr) {
  const AttentionInputs& in = args.in;
  const AttentionTasks tasks = attention_cpu_tasks(in);
  std::unique_ptr<float[]> parts;
  if (tasks.key_chunks > 1) {
    parts.reset(new (std::nothrow) float[tasks.key_chunks * args.grad_q_elements]);
    STD_TORCH_CHECK(parts != nullptr, "attention: no memory for ", tasks.key_chunks, " parts of grad_q");
  }
  run_on_cpu(tasks.backward, in.keys, [&](int64_t begin, int64_t end) {
    return attention_backward_cpu(args, {parts.get(), columns}, begin, end);
  });
  if (parts != nullptr) {
    constexpr int64_t kGrain = 1 << 14;  // elements
    const int64_t grain = kGrain / in.width > 1 ? kGrain / in.width : 1;
    torch::stable::parallel_for(0, args.grad_q_elements / in.width, grain, [&](int64_t begin, int64_t end) {
      attention_sum_parts_cpu(args, parts.get(), begin, end);
    });
  }
  if (args.grad_bias != nullptr) {
    run_on_cpu(tasks.bias, in.keys,
               [&](int64_t begin, int64_t end) { return attention_bias_backward_cpu(args, begin, end); });
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& key_weights,
                                   const MaybeTensor& mask, const MaybeTensor& bias, const MaybeTensor& lengths,
                                   const MaybeTensor& query_lengths, const MaybeTensor& cu_seqlens_q,
                                   const MaybeTensor& cu_seqlens_k, int64_t max_queries, int64_t max_keys, bool causal,
                                   double scale, double dropout_p, const MaybeTensor& seed,
                                   bool exact_zero_weight_grad) {
  const Inputs inputs =
      make_inputs({q, k, v, key_weights, mask, bias, lengths, query_lengths, cu_seqlens_q, cu_seqlens_k, max_queries,
                   max_keys, causal, scale, dropout_p, seed, exact_zero_weight_grad});
  Tensor out = contiguous_like(q), lse = contiguous_like(q, ScalarType::Float, q.dim() - 1);
  const AttentionForwardArgs args{inputs.view, array_of(out), vector_of(lse, inputs.packed)};
#ifdef MMER_WITH_CUDA
  if (q.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    check_launch(attention_forward_cuda(args, current_stream(q)), "attention_forward");
    return {out, lse};
  }
#endif
  run_on_cpu(attention_cpu_tasks(args.in).forward, args.in.keys,
             [&](int64_t begin, int64_t end) { return attention_forward_cpu(args, begin, end); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const MaybeTensor& grad_lse, const Tensor& out, const Tensor& lse, const Tensor& q,
    const Tensor& k, const Tensor& v, const MaybeTensor& key_weights, const MaybeTensor& mask, const MaybeTensor& bias,
    const MaybeTensor& lengths, const MaybeTensor& query_lengths, const MaybeTensor& cu_seqlens_q,
    const MaybeTensor& cu_seqlens_k, int64_t max_queries, int64_t max_keys, bool causal, double scale, double dropout_p,
    const MaybeTensor& seed, bool exact_zero_weight_grad, bool need_weights, bool need_bias) {
  const Inputs inputs =
      make_inputs({q, k, v, key_weights, mask, bias, lengths, query_lengths, cu_seqlens_q, cu_seqlens_k, max_queries,
                   max_keys, causal, scale, dropout_p, seed, exact_zero_weight_grad});
  const bool packed = inputs.packed;
  const Tokens grad = make_tokens(grad_out, "grad_out", q), output = make_tokens(out, "out", q);
  check_same_shape(grad_out, "grad_out", q);
  check_same_shape(out, "out", q);
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.dim() == q.dim() - 1, "lse must be float32");
  STD_TORCH_CHECK(!grad_lse || grad_lse->scalar_type() == ScalarType::Float, "grad_lse must be float32");
  for (int64_t i = 0; i < lse.dim(); ++i) STD_TORCH_CHECK(lse.size(i) == q.size(i), "lse has the wrong shape");
  if (grad_lse) check_same_shape(*grad_lse, "grad_lse", lse);

  Tensor grad_q = contiguous_like(q), grad_k = contiguous_like(k), grad_v = contiguous_like(v);
  const int64_t padded_shape[] = {inputs.view.batch, inputs.view.heads, inputs.view.keys};
  const int64_t packed_shape[] = {k.size(0), inputs.view.heads};
  const bool weights = need_weights && key_weights.has_value(), biased = need_bias && bias.has_value();
  Tensor grad_weights = !weights ? empty(q, {0}, ScalarType::Float)
                        : packed ? empty(q, packed_shape, ScalarType::Float)
                                 : empty(q, padded_shape, ScalarType::Float);
  Tensor grad_bias = biased ? contiguous_like(*bias) : empty(q, {0}, ScalarType::Float);

  AttentionBackwardArgs args{};
  args.in = inputs.view;
  args.grad_out = grad.array;
  args.out = output.array;
  args.lse = vector_of(lse, packed);
  if (grad_lse) args.grad_lse = vector_of(*grad_lse, packed);
  args.grad_q = array_of(grad_q);
  args.grad_q_elements = grad_q.numel();
  args.grad_k = array_of(grad_k);
  args.grad_v = array_of(grad_v);
  if (weights) args.grad_weights = vector_of(grad_weights, packed);
  if (biased) args.grad_bias = static_cast<float*>(grad_bias.data_ptr());
#ifdef MMER_WITH_CUDA
  if (q.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    const Tensor delta = contiguous_like(q, ScalarType::Float, q.dim() - 1);
    args.delta = vector_of(delta, packed);
    check_launch(attention_backward_cuda(args, current_stream(q)), "attention_backward");
    return {grad_q, grad_k, grad_v, grad_weights, grad_bias};
  }
#endif
  backward_on_cpu(args);
  return {grad_q, grad_k, grad_v, grad_weights, grad_bias};
}

// One of the three arrays in a contiguous (tokens, 3, heads, D) of float32 or of a type of half its size.
AttentionArray third_of(const Tensor& three, int64_t i) {
  const int64_t bytes = three.scalar_type() == ScalarType::Float ? 4 : 2;
  return {static_cast<char*>(three.data_ptr()) + i * three.stride(1) * bytes, 0, three.stride(2), three.stride(0)};
}

// Of packed self-attention on the CPU: the gradients of q, k and v side by side, (tokens, 3, heads, D), and their sums
// over the tokens, float32 (3, heads, D).
std::tuple<Tensor, Tensor> self_backward(const Tensor& grad_out, const Tensor& out, const Tensor& lse, const Tensor& q,
                                         const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, int64_t longest,
                                         double scale, double dropout_p, const MaybeTensor& seed) {
  const MaybeTensor none, ends(cu_seqlens);
  const Inputs inputs = make_inputs(
      {q, k, v, none, none, none, none, none, ends, ends, longest, longest, false, scale, dropout_p, seed, false});
  const AttentionInputs& in = inputs.view;
  check_same_shape(k, "k", q);
  const Tokens grad = make_tokens(grad_out, "grad_out", q), output = make_tokens(out, "out", q);
  check_same_shape(grad_out, "grad_out", q);
  check_same_shape(out, "out", q);
  STD_TORCH_CHECK(
      lse.scalar_type() == ScalarType::Float && lse.dim() == 2 && lse.size(0) == q.size(0) && lse.size(1) == q.size(1),
      "lse must be float32 of shape (tokens, heads)");

  const int64_t shape[] = {q.size(0), 3, in.heads, in.width};
  const Tensor grads = empty(q, shape, q.scalar_type());
  const int64_t columns = 3 * in.heads * in.width, samples = in.batch * attention_cpu_tasks(in).key_chunks;
  const int64_t sums_shape[] = {3, in.heads, in.width}, parts_shape[] = {samples, columns};
  const Tensor sums = empty(q, sums_shape, ScalarType::Float), parts = empty(q, parts_shape, ScalarType::Float);

  AttentionBackwardArgs args{};
  args.in = in;
  args.grad_out = grad.array;
  args.out = output.array;
  args.lse = vector_of(lse, true);
  args.grad_q = third_of(grads, 0);
  args.grad_k = third_of(grads, 1);
  args.grad_v = third_of(grads, 2);
  args.grad_q_elements = q.numel();
  float *sum = static_cast<float*>(sums.data_ptr()), *part = static_cast<float*>(parts.data_ptr());
  backward_on_cpu(args, part);
  for (int64_t j = 0; j < columns; ++j) sum[j] = 0;
  for (int64_t i = 0; i < samples; ++i, part += columns) {
    for (int64_t j = 0; j < columns; ++j) sum[j] += part[j];
  }
  return {grads, sums};
}

}  // namespace

MMER_IMPLEMENT(CPU, library) {
  library.impl("attention_forward", TORCH_BOX(&forward));
  library.impl("attention_backward", TORCH_BOX(&backward));
  library.impl("self_attention_backward", TORCH_BOX(&self_backward));
}

#ifdef MMER_WITH_CUDA
MMER_IMPLEMENT(CUDA, library) {
  library.impl("attention_forward", TORCH_BOX(&forward));
  library.impl("attention_backward", TORCH_BOX(&backward));
}
#endif

}  // namespace mmer
