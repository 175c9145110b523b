// Arguments of the attention kernels, the same for CPU and CUDA: raw pointers, sizes, strides in elements.
//
//     p_ij = m_j e^(x_ij) / sum_l m_l e^(x_il),   x_ij = scale q_i . k_j + b_ij,   o_i = sum_j p_ij v_j
#pragma once

#include "soft_topk_args.h"

namespace mmer {

// A (batch, heads, tokens, width) array whose entries of a token lie side by side.
struct AttentionArray {
  const void* data;
  int64_t batch, head, token;  // strides

  template <class T>
  const T* at(int64_t b, int64_t h, int64_t t) const {
    return static_cast<const T*>(data) + b * batch + h * head + t * token;
  }
};

// What the forward and the backward pass share.
struct AttentionInputs {
  DType dtype;  // of q, k, v, out and their gradients
  int64_t batch, heads, key_heads, queries, keys, width;
  AttentionArray q, k, v;
  const float* key_weights;  // m or null
  int64_t weights_batch, weights_head;
  const int64_t* lengths;        // [B] or null
  const int64_t* query_lengths;  // [B] or null
  const uint8_t* mask;           // [B, S] or null
  int64_t mask_stride;
  const float* bias;  // b or null
  int64_t bias_batch, bias_head, bias_query, bias_key;
  bool causal;
  double scale;
};

struct AttentionForwardArgs {
  AttentionInputs in;
  void* out;   // [B, H, L, D] contiguous
  float* lse;  // [B, H, L]
};

struct AttentionBackwardArgs {
  AttentionInputs in;
  AttentionArray grad_out, out;
  const float* lse;     // [B, H, L]
  void* grad_q;         // [B, H, L, D] contiguous
  void* grad_k;         // [B, Hk, S, D] contiguous
  void* grad_v;         // [B, Hk, S, D] contiguous
  float* grad_weights;  // [B, H, S], dL/dm of each head, or null
};

}  // namespace mmer
