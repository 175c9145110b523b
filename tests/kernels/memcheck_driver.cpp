// Every CPU kernel once or twice, for valgrind: heap blocks of just their size, and what no result may depend on
// (padding, rows beyond a length, outputs) left uninitialised. Ends with 1 where an output is not a number; the branch
// on it is what makes valgrind report one that was computed from uninitialised memory.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/attention.h"
#include "cpu/dispatch.h"
#include "cpu/dropout.h"
#include "cpu/perturbation.h"
#include "cpu/soft_topk.h"

namespace {

using mmer::DType;

int failures = 0;

// `count` numbers of `dtype`, uninitialised.
class Array {
 public:
  Array(DType dtype, int64_t count)
      : dtype_(dtype),
        bytes_(dtype == DType::kFloat64 ? 8 : (dtype == DType::kFloat32 ? 4 : 2)),
        count_(count),
        data_(std::malloc(static_cast<size_t>(count * bytes_))) {}
  ~Array() { std::free(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }
  double* doubles() const { return static_cast<double*>(data_); }

  void set(int64_t i, double x) const {
    if (bytes_ == 8) return static_cast<void>(doubles()[i] = x);
    const float narrow = static_cast<float>(x);
    if (bytes_ == 4) return static_cast<void>(floats()[i] = narrow);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    static_cast<uint16_t*>(data_)[i] = static_cast<uint16_t>(bits >> 16);
  }
  double get(int64_t i) const {
    if (bytes_ == 8) return doubles()[i];
    if (bytes_ == 4) return floats()[i];
    const uint32_t bits = static_cast<uint32_t>(static_cast<uint16_t*>(data_)[i]) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  }

  // Numbers within [-1, 1] at [begin, end).
  const Array& fill(int64_t begin, int64_t end) const {
    static uint32_t state = 1;
    for (int64_t i = begin; i < end; ++i) {
      state = state * 1664525u + 1013904223u;
      set(i, static_cast<double>(state >> 8) / (1 << 23) - 1);
    }
    return *this;
  }
  const Array& fill() const { return fill(0, count_); }

  void check(const char* name) const {
    for (int64_t i = 0; i < count_; ++i) {
      const double x = get(i);
      if (!(x - x == 0)) {
        std::fprintf(stderr, "%s: entry %lld is %g\n", name, static_cast<long long>(i), x);
        ++failures;
        return;
      }
    }
  }

 private:
  DType dtype_;
  int64_t bytes_, count_;
  void* data_;
};

void expect(bool done, const char* name) {
  if (!done) {
    std::fprintf(stderr, "%s: no memory\n", name);
    ++failures;
  }
}

void soft_topk(DType dtype, int64_t cols, double tau, bool largest) {
  constexpr int64_t kRows = 3;
  const int64_t lengths[kRows] = {cols, cols / 2 + 1, 1}, stride = cols + 5;
  const Array scores(dtype, kRows * stride), grads(dtype, kRows * stride);
  for (int64_t row = 0; row < kRows; ++row) {
    scores.fill(row * stride, row * stride + lengths[row]);
    grads.fill(row * stride, row * stride + lengths[row]);
  }
  const Array weights(dtype, kRows * cols), threshold(DType::kFloat64, kRows), certificate(DType::kFloat64, 2 * kRows);
  mmer::SoftTopKForwardArgs forward{};
  forward.in = {dtype, kRows, cols, scores.data(), stride, lengths, nullptr, 0, nullptr, tau, largest};
  forward.k_value = 0.6;
  forward.weights = weights.data();
  forward.threshold = threshold.doubles();
  forward.certificate = certificate.doubles();
  expect(mmer::soft_topk_forward_cpu(forward, 0, kRows), "soft_topk_forward");
  weights.check("soft_topk weights");
  threshold.check("soft_topk threshold");
  certificate.check("soft_topk certificate");

  const Array grad_scores(dtype, kRows * cols), grad_k(DType::kFloat64, kRows), grad_tau(DType::kFloat64, kRows);
  mmer::SoftTopKBackwardArgs backward{};
  backward.in = forward.in;
  backward.grad_weights = grads.data();
  backward.grad_weights_stride = stride;
  backward.threshold = threshold.doubles();
  backward.grad_scores = grad_scores.data();
  backward.grad_k = grad_k.doubles();
  backward.grad_tau = grad_tau.doubles();
  expect(mmer::soft_topk_backward_cpu(backward, 0, kRows), "soft_topk_backward");
  grad_scores.check("soft_topk grad_scores");
  grad_k.check("soft_topk grad_k");
  grad_tau.check("soft_topk grad_tau");
}

void attention(DType dtype, int64_t queries, int64_t keys, int64_t width, bool causal) {
  constexpr int64_t kBatch = 2, kHeads = 2;
  const int64_t query_lengths[kBatch] = {queries, queries / 2}, lengths[kBatch] = {keys, keys / 2 + 1}, seed = 9;
  const auto tokens = [&](int64_t count) { return kBatch * kHeads * count * width; };
  const Array q(dtype, tokens(queries)), k(dtype, tokens(keys)), v(dtype, tokens(keys)), out(dtype, tokens(queries));
  const Array m(DType::kFloat32, kBatch * keys), bias(DType::kFloat32, queries * keys);
  const Array lse(DType::kFloat32, kBatch * kHeads * queries);
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t j = 0; j < lengths[b]; ++j) m.set(b * keys + j, j % 3 == 0 ? 0.0 : 0.5);
    for (int64_t h = 0; h < kHeads; ++h) {
      const int64_t head = b * kHeads + h;
      q.fill(head * queries * width, (head * queries + query_lengths[b]) * width);
      for (const Array* array : {&k, &v}) array->fill(head * keys * width, (head * keys + lengths[b]) * width);
    }
  }
  bias.fill();
  const auto heads_of = [&](const Array& array, int64_t count) {
    return mmer::AttentionArray{array.data(), kHeads * count * width, count * width, width};
  };
  mmer::AttentionInputs in{};
  in.dtype = dtype;
  in.batch = kBatch;
  in.heads = in.key_heads = kHeads;
  in.queries = queries;
  in.keys = keys;
  in.width = width;
  in.q = heads_of(q, queries);
  in.k = heads_of(k, keys);
  in.v = heads_of(v, keys);
  in.key_weights = {m.floats(), keys, 0, 1};
  in.bias = bias.floats();
  in.bias_batches = in.bias_heads = 1;
  in.bias_queries = queries;
  in.bias_query = keys;
  in.bias_key = 1;
  in.lengths = lengths;
  in.query_lengths = query_lengths;
  in.causal = causal;
  in.scale = 0.5;
  in.dropout_p = 0.2;
  in.seed = &seed;
  const mmer::AttentionForwardArgs forward{in, heads_of(out, queries), {lse.floats(), kHeads * queries, queries, 1}};
  const mmer::AttentionTasks tasks = mmer::attention_cpu_tasks(in);
  expect(mmer::attention_forward_cpu(forward, 0, tasks.forward), "attention_forward");
  out.check("attention out");

  const Array grad(dtype, tokens(queries)), grad_q(dtype, tokens(queries)), grad_k(dtype, tokens(keys));
  const Array grad_v(dtype, tokens(keys)), grad_m(DType::kFloat32, kBatch * kHeads * keys);
  const Array grad_bias(DType::kFloat32, queries * keys);
  grad.fill();
  mmer::AttentionBackwardArgs backward{};
  backward.in = in;
  backward.grad_out = heads_of(grad, queries);
  backward.out = forward.out;
  backward.lse = forward.lse;
  backward.grad_q = heads_of(grad_q, queries);
  backward.grad_q_elements = tokens(queries);
  backward.grad_k = heads_of(grad_k, keys);
  backward.grad_v = heads_of(grad_v, keys);
  backward.grad_weights = {grad_m.floats(), kHeads * keys, keys, 1};
  backward.grad_bias = grad_bias.floats();
  const Array parts(DType::kFloat32, tasks.key_chunks * backward.grad_q_elements);
  const Array columns(DType::kFloat32, kBatch * tasks.key_chunks * 3 * kHeads * in.width);
  const mmer::AttentionParts given{tasks.key_chunks > 1 ? parts.floats() : nullptr, columns.floats()};
  expect(mmer::attention_backward_cpu(backward, given, 0, tasks.backward), "attention_backward");
  const int64_t rows = backward.grad_q_elements / in.width;
  if (given.grad_q != nullptr) mmer::attention_sum_parts_cpu(backward, given.grad_q, 0, rows);
  expect(mmer::attention_bias_backward_cpu(backward, 0, tasks.bias), "attention_bias_backward");
  grad_q.check("attention grad_q");
  grad_k.check("attention grad_k");
  grad_v.check("attention grad_v");
  grad_m.check("attention grad_weights");
  grad_bias.check("attention grad_bias");
  columns.check("attention columns");
}

void perturbation(DType dtype, int64_t n) {
  const Array w(dtype, n), g(dtype, n), stash(dtype, n);
  w.fill();
  g.fill();
  const mmer::PerturbationTensor tensor{w.data(), g.data(), stash.data(), n, dtype, dtype};
  const mmer::PerturbationChunk chunk{0, 0, n};
  double norm = 0, weight_norm = 0, factor = 0, part = 0, weight_part = 0;
  mmer::PerturbationArgs args{};
  args.tensors = &tensor;
  args.count = 1;
  args.scope = mmer::PerturbationScope::kAwp;
  args.radius = 0.5;
  args.norms = &norm;
  args.weight_norms = &weight_norm;
  args.factors = &factor;
  const mmer::PerturbationCpuArgs call{args, &chunk, &part, &weight_part, false};
  mmer::perturbation_norm_cpu(call, 0, 1);
  norm = part;
  weight_norm = weight_part;
  factor = 0.5 * weight_norm / norm;
  mmer::perturbation_apply_cpu(call, 0, 1);
  w.check("perturbed weights");
  stash.check("stash");
  mmer::perturbation_restore_cpu(call, 0, 1);
  if (std::memcmp(w.data(), stash.data(), static_cast<size_t>(n) * (dtype == DType::kFloat32 ? 4 : 2)) != 0) ++failures;
}

void dropout(DType dtype, int64_t rows, int64_t cols) {
  const int64_t seed = 5, n = rows * cols, chunks = mmer::sum_chunks(rows);
  const mmer::DropoutDraw draw{0.3, &seed};
  const Array x(dtype, n), residual(dtype, n), grad(dtype, n), out(dtype, n), back(dtype, n), grad_residual(dtype, n);
  const Array row(DType::kFloat32, cols), moments(DType::kFloat32, 2 * rows), sums(DType::kFloat32, chunks * 3 * cols);
  const Array total(DType::kFloat32, cols);
  for (const Array* array : {&x, &residual, &grad, &row}) array->fill();
  expect(mmer::dropout_cpu({dtype, x.data(), out.data(), draw}, 0, n), "dropout");
  out.check("dropout");
  expect(mmer::relu_dropout_cpu({dtype, cols, x.data(), row.data(), out.data(), draw}, 0, rows), "relu_dropout");
  out.check("relu_dropout");
  mmer::relu_dropout_backward_cpu({dtype, rows, cols, grad.data(), out.data(), 0.3, back.data(), sums.data()}, 0,
                                  chunks);
  back.check("relu_dropout grad");
  const mmer::DropoutNormInputs in{dtype, rows, cols, x.data(), row.data(), residual.data(), row.data(), draw};
  expect(mmer::dropout_norm_forward_cpu({in, row.data(), 1e-5, out.data(), moments.data()}, 0, rows), "dropout_norm");
  out.check("dropout_norm");
  moments.check("dropout_norm moments");
  expect(mmer::dropout_norm_backward_cpu(
             {in, grad.data(), moments.data(), back.data(), grad_residual.data(), sums.data()}, 0, chunks),
         "dropout_norm_backward");
  back.check("dropout_norm grad_x");
  grad_residual.check("dropout_norm grad_residual");
  for (int64_t kind = 0; kind < 3; ++kind) {
    mmer::sum_of_chunks_cpu(dtype, sums.data(), chunks, 3, cols, kind, total.data());
    total.check("dropout_norm sums");
  }
}

}  // namespace

int main() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16}) {
    for (const int64_t cols : {1, 17, 200}) {
      soft_topk(dtype, cols, 0.05, true);
      soft_topk(dtype, cols, 1e-9, false);
    }
  }
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    attention(dtype, 7, 5, 3, false);
    attention(dtype, 50, 70, 17, true);
    attention(dtype, 3, 1200, 4, false);
    perturbation(dtype, 1);
    perturbation(dtype, 1234);
    dropout(dtype, 1, 1);
    dropout(dtype, 37, 29);
  }
  std::printf("%s, %d failures\n", mmer::cpu_isa_name(), failures);
  return failures == 0 ? 0 : 1;
}
