// The launchers of kernels/cuda/attention.h for ctypes: their arguments as a list of numbers, in the order of
// launch.py.
#include "../../../kernels/cuda/attention.h"

namespace {

class Numbers {
 public:
  explicit Numbers(const int64_t* first) : next_(first) {}

  int64_t number() { return *next_++; }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(number());
  }
  template <class Strided>
  Strided strided() {
    Strided array{};
    array.data = pointer<std::remove_pointer_t<decltype(array.data)>>();
    array.batch = number();
    array.head = number();
    array.token = number();
    return array;
  }
  mmer::AttentionArray array() { return strided<mmer::AttentionArray>(); }
  mmer::AttentionVector vector() { return strided<mmer::AttentionVector>(); }

  mmer::AttentionInputs inputs(double scale, double dropout_p) {
    mmer::AttentionInputs in{};
    in.dtype = static_cast<mmer::DType>(number());
    for (int64_t* size : {&in.batch, &in.heads, &in.key_heads, &in.queries, &in.keys, &in.width}) *size = number();
    in.q = array();
    in.k = array();
    in.v = array();
    in.key_weights = vector();
    in.mask = pointer<const uint8_t>();
    in.mask_batch = number();
    in.bias = pointer<const float>();
    for (int64_t* size : {&in.bias_batches, &in.bias_heads, &in.bias_queries}) *size = number();
    for (int64_t* stride : {&in.bias_batch, &in.bias_head, &in.bias_query, &in.bias_key}) *stride = number();
    in.lengths = pointer<const int64_t>();
    in.query_lengths = pointer<const int64_t>();
    in.cu_seqlens_q = pointer<const int32_t>();
    in.cu_seqlens_k = pointer<const int32_t>();
    in.causal = number() != 0;
    in.seed = pointer<const int64_t>();
    in.exact_zero_weight_grad = number() != 0;
    in.scale = scale;
    in.dropout_p = dropout_p;
    return in;
  }

 private:
  const int64_t* next_;
};

}  // namespace

extern "C" {

int attention_forward(const int64_t* list, double scale, double dropout_p) {
  Numbers numbers(list);
  mmer::AttentionForwardArgs args{};
  args.in = numbers.inputs(scale, dropout_p);
  args.out = numbers.array();
  args.lse = numbers.vector();
  return mmer::attention_forward_cuda(args, nullptr);
}

int attention_backward(const int64_t* list, double scale, double dropout_p) {
  Numbers numbers(list);
  mmer::AttentionBackwardArgs args{};
  args.in = numbers.inputs(scale, dropout_p);
  args.grad_out = numbers.array();
  args.out = numbers.array();
  args.lse = numbers.vector();
  args.grad_lse = numbers.vector();
  args.grad_q = numbers.array();
  args.grad_k = numbers.array();
  args.grad_v = numbers.array();
  args.grad_weights = numbers.vector();
  args.grad_bias = numbers.pointer<float>();
  args.delta = numbers.vector();
  return mmer::attention_backward_cuda(args, nullptr);
}

}  // extern "C"
