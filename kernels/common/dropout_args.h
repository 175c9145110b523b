// Arguments of dropout and of what is fused with it: raw pointers and sizes. Arrays are contiguous; a "wide" one holds
// floats, or doubles where the dtype is float64.
//
// draw_i, i the index of an element of the whole tensor, is half i mod 8 of the counter (i div 8, 0, 0, 0) under the
// seed (philox.h has the rule, and q). A backward pass draws it again.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "philox.h"

namespace mmer {

constexpr int64_t kMostDropoutElements = int64_t{1} << 35;  // a counter's first word has 32 bits

struct DropoutDraw {
  double p;             // in [0, 1)
  const int64_t* seed;  // null where p is 0: nothing is drawn
};

// out = mask x
struct DropoutArgs {
  DType dtype;
  const void* x;  // [n]
  void* out;      // [n]
  DropoutDraw draw;
};

// out = mask relu(x + bias)
struct ReluDropoutArgs {
  DType dtype;
  int64_t cols;      // D
  const void* x;     // [R, D]
  const void* bias;  // [D] wide, or null: 0
  void* out;         // [R, D]
  DropoutDraw draw;
};

// grad_x = grad/(1 - q) where out > 0, else 0: neither mask nor x is needed
struct ReluDropoutBackwardArgs {
  DType dtype;
  int64_t rows, cols;
  const void* grad;  // [R, D]
  const void* out;   // [R, D]
  double p;
  void* grad_x;  // [R, D]
  void* sums;    // [chunks, 1, D] wide: grad_x over the rows of each chunk
};

// s = residual + mask (x + x_bias),   y = (s - mean(s)) rstd weight + bias,   rstd = (var(s) + eps)^(-1/2)
struct DropoutNormInputs {
  DType dtype;           // of x, residual, y and their gradients
  int64_t rows, cols;    // R, D >= 1
  const void* x;         // [R, D]
  const void* x_bias;    // [D] wide, or null: 0
  const void* residual;  // [R, D]
  const void* weight;    // [D] wide
  DropoutDraw draw;
};

struct DropoutNormForwardArgs {
  DropoutNormInputs in;
  const void* bias;  // [D] wide
  double eps;
  void* y;        // [R, D]
  void* moments;  // [R, 2] wide: mean, rstd
};

struct DropoutNormBackwardArgs {
  DropoutNormInputs in;
  const void* grad;     // [R, D]
  const void* moments;  // [R, 2] wide
  void* grad_x;         // [R, D]; null where p is 0: it is grad_residual
  void* grad_residual;  // [R, D]
  void* sums;           // [chunks, 3, D] wide: grad_x, grad_weight, grad_bias over the rows of each chunk
};

}  // namespace mmer
