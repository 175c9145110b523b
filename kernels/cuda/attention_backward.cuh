// What the kernels of attention's backward pass share.
//
//     e_ij = e^(x_ij - lse_i),   p_ij = m_j e_ij,   delta_i = do_i . o_i - dL/dlse_i
//     dP_ij = keep_ij / (1 - p_drop) do_i . v_j,   ds_ij = p_ij (dP_ij - delta_i)
#pragma once

#include "attention.h"
#include "attention_keys.cuh"

namespace mmer {

// Rows of the tiles that a kernel passes through: fewer where a row is long, for shared memory and registers.
template <class T, int kWidth>
inline constexpr int kPassedRows = kWidth * sizeof(T) <= (sizeof(T) == 2 ? 256 : 128) ? 32 : 16;

// Of a lane's two rows of queries, g and g + 8.
struct QueryRows {
  float lse[2];  // to base 2, +infinity where the query takes no part
  float delta[2];

  __device__ __forceinline__ QueryRows(const AttentionBackwardArgs& args, const Head& at, int first) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first + (lane_index() >> 2) + 8 * half;
      lse[half] = base2_lse(args.lse, at, at.head, query);
      delta[half] = query < at.query_count ? *args.delta.at(at.batch, at.head, at.query_first + query) : 0.0f;
    }
  }

  // Where not, p is 0 but ds = 0 (dP - delta) need not be: the upstream gradient may be NaN.
  __device__ __forceinline__ bool takes_part(int half) const { return lse[half] != positive_infinity(); }
};

// y = p and dp = do . v to ds, in dp.
template <int kTiles>
__device__ __forceinline__ void differentiate_queries(const float (&p)[kTiles][4], float (&dp)[kTiles][4],
                                                      const QueryRows& rows) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    dp[i / 4][i % 4] = p[i / 4][i % 4] * (dp[i / 4][i % 4] - rows.delta[i % 4 / 2]);
  }
}

cudaError_t launch_attention_grad_query(const AttentionBackwardArgs& args, const Plan& plan, cudaStream_t stream);
cudaError_t launch_attention_grad_key(const AttentionBackwardArgs& args, const Plan& plan, cudaStream_t stream);
cudaError_t launch_attention_grad_bias(const AttentionBackwardArgs& args, const Plan& plan, cudaStream_t stream);

}  // namespace mmer
