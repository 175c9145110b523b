// The CPU attention kernels over NumPy arrays (numpy_module.cpp has the module). Tasks run one after the other.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/attention.h"

namespace py = pybind11;

namespace {

using Options = py::dict;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

bool given(const Options& options, const char* name) { return options.contains(name) && !options[name].is_none(); }

py::array array_of(const Options& options, const char* name) { return py::cast<py::array>(options[name]); }

template <class T>
const T* data_of(const Options& options, const char* name) {
  if (!given(options, name)) return nullptr;
  const py::array array = array_of(options, name);
  require(array.itemsize() == sizeof(T) && (array.flags() & py::array::c_style), std::string(name) + ": wrong array");
  return static_cast<const T*>(array.data());
}

int64_t stride(const py::array& array, int dim) { return array.strides(dim) / array.itemsize(); }

// (B, heads, tokens, D), packed (tokens, heads, D).
mmer::AttentionArray tokens(const py::array& array) {
  void* data = const_cast<void*>(array.data());
  if (array.ndim() == 3) return {data, 0, stride(array, 1), stride(array, 0)};
  require(array.ndim() == 4, "tokens must have 3 or 4 dimensions");
  return {data, stride(array, 0), stride(array, 1), stride(array, 2)};
}

// (B, heads, tokens), packed (tokens, heads).
mmer::AttentionVector vector(const Options& options, const char* name) {
  if (!given(options, name)) return {};
  const py::array array = array_of(options, name);
  require(py::isinstance<py::array_t<float>>(array), std::string(name) + " must be float32");
  float* data = static_cast<float*>(const_cast<void*>(array.data()));
  if (array.ndim() == 2) return {data, 0, stride(array, 1), stride(array, 0)};
  return {data, stride(array, 0), stride(array, 1), stride(array, 2)};
}

mmer::DType dtype_of(const std::string& name) {
  if (name == "float32") return mmer::DType::kFloat32;
  if (name == "bfloat16") return mmer::DType::kBFloat16;
  require(name == "float16", "dtype must be float32, bfloat16 or float16, got " + name);
  return mmer::DType::kFloat16;
}

template <class T>
T value(const Options& options, const char* name) {
  return py::cast<T>(options[name]);
}

mmer::AttentionInputs inputs_of(const Options& o) {
  mmer::AttentionInputs in{};
  const py::array q = array_of(o, "q"), k = array_of(o, "k");
  const bool packed = q.ndim() == 3;
  in.dtype = dtype_of(value<std::string>(o, "dtype"));
  in.batch = packed ? array_of(o, "cu_seqlens_q").size() - 1 : q.shape(0);
  in.heads = q.shape(1);
  in.key_heads = k.shape(1);
  in.queries = packed ? value<int64_t>(o, "max_queries") : q.shape(2);
  in.keys = packed ? value<int64_t>(o, "max_keys") : k.shape(2);
  in.width = q.shape(q.ndim() - 1);
  in.q = tokens(q);
  in.k = tokens(k);
  in.v = tokens(array_of(o, "v"));
  in.key_weights = vector(o, "key_weights");
  in.mask = data_of<uint8_t>(o, "mask");
  in.mask_batch = in.keys;
  in.lengths = data_of<int64_t>(o, "lengths");
  in.query_lengths = data_of<int64_t>(o, "query_lengths");
  in.cu_seqlens_q = data_of<int32_t>(o, "cu_seqlens_q");
  in.cu_seqlens_k = data_of<int32_t>(o, "cu_seqlens_k");
  in.bias = data_of<float>(o, "bias");
  if (in.bias != nullptr) {
    const py::array bias = array_of(o, "bias");
    in.bias_batches = bias.shape(0);
    in.bias_heads = bias.shape(1);
    in.bias_queries = bias.shape(2);
    in.bias_batch = in.bias_batches == 1 ? 0 : stride(bias, 0);
    in.bias_head = in.bias_heads == 1 ? 0 : stride(bias, 1);
    in.bias_query = in.bias_queries == 1 ? 0 : stride(bias, 2);
    in.bias_key = 1;
  }
  in.causal = value<bool>(o, "causal");
  in.scale = value<double>(o, "scale");
  in.dropout_p = value<double>(o, "dropout_p");
  in.seed = data_of<int64_t>(o, "seed");
  in.exact_zero_weight_grad = value<bool>(o, "exact");
  return in;
}

void enough_memory(bool ok) {
  if (!ok) throw std::bad_alloc();
}

void forward(const Options& options) {
  const mmer::AttentionForwardArgs args{inputs_of(options), tokens(array_of(options, "out")), vector(options, "lse")};
  enough_memory(mmer::attention_forward_cpu(args, 0, mmer::attention_cpu_tasks(args.in).forward));
}

void backward(const Options& options) {
  mmer::AttentionBackwardArgs args{};
  args.in = inputs_of(options);
  args.grad_out = tokens(array_of(options, "grad_out"));
  args.out = tokens(array_of(options, "out"));
  args.lse = vector(options, "lse");
  args.grad_lse = vector(options, "grad_lse");
  args.grad_q = tokens(array_of(options, "grad_q"));
  args.grad_q_elements = array_of(options, "grad_q").size();
  args.grad_k = tokens(array_of(options, "grad_k"));
  args.grad_v = tokens(array_of(options, "grad_v"));
  args.grad_weights = vector(options, "grad_weights");
  args.grad_bias = const_cast<float*>(data_of<float>(options, "grad_bias"));
  const mmer::AttentionTasks tasks = mmer::attention_cpu_tasks(args.in);
  const mmer::AttentionParts parts{const_cast<float*>(data_of<float>(options, "parts")),
                                   const_cast<float*>(data_of<float>(options, "columns"))};
  require((tasks.key_chunks > 1) == (parts.grad_q != nullptr), "parts are for several chunks of keys");
  enough_memory(mmer::attention_backward_cpu(args, parts, 0, tasks.backward));
  const int64_t rows = args.grad_q_elements / args.in.width;
  if (parts.grad_q != nullptr) mmer::attention_sum_parts_cpu(args, parts.grad_q, 0, rows);
  if (args.grad_bias != nullptr) enough_memory(mmer::attention_bias_backward_cpu(args, 0, tasks.bias));
}

int64_t key_chunks(const Options& options) { return mmer::attention_cpu_tasks(inputs_of(options)).key_chunks; }

}  // namespace

void bind_attention(py::module_& module) {
  module.def("attention_forward", &forward, "Fills out and lse; a dictionary of arrays and numbers.");
  module.def("attention_backward", &backward, "Fills grad_q, grad_k, grad_v and, where given, the other gradients.");
  module.def("attention_key_chunks", &key_chunks, "How many parts of grad_q the backward pass needs, 1 or more.");
}
