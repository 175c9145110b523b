// Arguments of the soft top-k kernels, the same for CPU and CUDA: raw pointers, sizes, strides.
//
//     T_i = sigma(sign (s_i - lambda) / tau),   sum_i T_i = k,   tau = epsilon Z / 2
//
// Rows are independent. `lengths` and `mask` are alternatives; entries outside take no part and get 0.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mmer {

// Entries of a row: the CPU counts them in 32 bits when it selects, CUDA numbers them in 31, with room for a team's
// spans.
constexpr int64_t kLongestRow = (int64_t{1} << 32) - 1;
constexpr int64_t kLongestCudaRow = (int64_t{1} << 30) - 1;

// What the rows share in the forward and the backward pass.
struct SoftTopKRows {
  DType dtype;             // of scores, weights and their gradients
  int64_t rows;            // R
  int64_t cols;            // n, the padded row length
  const void* scores;      // [R, n], unit column stride
  int64_t scores_stride;   // elements from row to row
  const int64_t* lengths;  // [R] or null
  const uint8_t* mask;     // [R, n] (1 = valid) or null
  int64_t mask_stride;     // elements from row to row
  const double* tau;       // [R] or null: then tau_value
  double tau_value;
  bool largest;  // sign = +1, else -1
};

struct SoftTopKForwardArgs {
  SoftTopKRows in;
  const double* k;  // [R] or null: then k_value
  double k_value;
  int64_t sinkhorn_iterations;  // 0: solve the fixed point; N > 0: the output after N Sinkhorn iterations
  void* weights;                // [R, n] contiguous: T
  double* threshold;            // [R]: lambda in the units of the scores
  double* certificate;          // [R, 2]: residual sum sigma((s - lambda)/tau) - k, sweeps over the row
};

struct SoftTopKBackwardArgs {
  SoftTopKRows in;
  const void* grad_weights;  // [R, n], unit column stride
  int64_t grad_weights_stride;
  const double* threshold;       // [R]
  const double* grad_threshold;  // [R] or null
  void* grad_scores;             // [R, n] contiguous
  double* grad_k;                // [R]
  double* grad_tau;              // [R]
};

}  // namespace mmer
