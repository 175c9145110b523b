// Arguments of the attention kernels, the same for CPU and CUDA: raw pointers, sizes, strides in elements.
//
//     p_ij = m_j e^(x_ij) / sum_l m_l e^(x_il),   x_ij = scale q_i . k_j + b_ij,   o_i = sum_j p_ij v_j
//
// A batch is padded, (batch, heads, tokens, width) with lengths, or packed, (tokens of all samples, heads, width) with
// the samples' ends in cu_seqlens. `query_span` and `key_span` hide the difference.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"

namespace mmer {

// Tokens of a sample are counted in 32 bits, with room for the rest of the block that holds the last one.
constexpr int64_t kLongestSample = (int64_t{1} << 31) - 1024;

// An array whose entries of a token lie side by side. Packed: the batch stride is 0.
struct AttentionArray {
  void* data;
  int64_t batch, head, token;  // strides

  template <class T>
  MMER_HD_MEMBER T* at(int64_t b, int64_t h, int64_t t) const {
    return static_cast<T*>(data) + b * batch + h * head + t * token;
  }
};

// One number for each head and token, in the layout of its tensor.
struct AttentionVector {
  float* data;
  int64_t batch, head, token;  // strides

  MMER_HD_MEMBER float* at(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

// Where a sample's tokens are, and how many of them count.
struct AttentionSpan {
  int64_t first;  // token of the array, from the sample's own start (padded: 0)
  int64_t count;  // tokens that count
  int64_t room;   // tokens that exist: those behind `count` are padding, whose results are 0
};

// What the forward and the backward pass share.
struct AttentionInputs {
  DType dtype;                      // of q, k, v, out and their gradients; not float64
  int64_t batch, heads, key_heads;  // B, H, Hk: key head h Hk / H serves query head h
  int64_t queries, keys, width;     // L, S of the longest sample, D
  AttentionArray q, k, v;           // [B, H, L, D], [B, Hk, S, D]; packed [Tq, H, D], [Tk, Hk, D]
  AttentionVector key_weights;      // m: (B, H, S) or packed (Tk, H), a stride 0 where shared; data may be null
  const uint8_t* mask;              // [B, S], 1 where a key counts, or null; padded only
  int64_t mask_batch;               // its stride
  const float* bias;                // b: [1|B, 1|H, 1|L, S], or null
  int64_t bias_batches, bias_heads, bias_queries;       // its sizes
  int64_t bias_batch, bias_head, bias_query, bias_key;  // its strides, 0 where the size is 1
  const int64_t *lengths, *query_lengths;               // [B] or null; padded only
  const int32_t *cu_seqlens_q, *cu_seqlens_k;           // [B + 1], both or neither; packed only
  bool causal;                                          // query i sees the keys j <= i
  double scale;
  double dropout_p;             // 0: none
  const int64_t* seed;          // one number, for dropout; in the memory of the device
  bool exact_zero_weight_grad;  // dm also where m = 0 (backward only: the forward pass leaves such keys out)

  MMER_HD_MEMBER AttentionSpan query_span(int64_t b) const { return span(b, cu_seqlens_q, query_lengths, queries); }
  MMER_HD_MEMBER AttentionSpan key_span(int64_t b) const { return span(b, cu_seqlens_k, lengths, keys); }

 private:
  MMER_HD_MEMBER static AttentionSpan span(int64_t b, const int32_t* cu_seqlens, const int64_t* lengths,
                                           int64_t longest) {
    if (cu_seqlens != nullptr) {
      const int64_t count = cu_seqlens[b + 1] - cu_seqlens[b];
      return {cu_seqlens[b], count, count};
    }
    const int64_t count = lengths == nullptr || lengths[b] > longest ? longest : lengths[b];
    return {0, count, longest};
  }
};

struct AttentionForwardArgs {
  AttentionInputs in;
  AttentionArray out;   // [B, H, L, D], packed [Tq, H, D], contiguous
  AttentionVector lse;  // [B, H, L], packed [Tq, H], contiguous: log-sum-exp of a query's weighted scores
};

struct AttentionBackwardArgs {
  AttentionInputs in;
  AttentionArray grad_out, out;
  AttentionVector lse;       // of the forward pass
  AttentionVector grad_lse;  // data may be null
  AttentionArray grad_q;     // as q; contiguous on a GPU
  int64_t grad_q_elements;
  AttentionArray grad_k, grad_v;  // as k; contiguous on a GPU
  AttentionVector grad_weights;   // [B, H, S], packed [Tk, H]: dL/dm of each head; data is null where nobody asks
  float* grad_bias;               // contiguous, of the bias's sizes, or null
  AttentionVector delta;          // scratch of the GPU kernels: do . o - dL/dlse of each query
};

}  // namespace mmer
