// Launchers of the CUDA attention. Pointers are device pointers, except the argument structs themselves.
//
// No host synchronisation, no allocation: safe to capture in a CUDA graph. Every output has one owner and one order of
// summation (no atomics), so two runs on one device give the same bits.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/attention_args.h"

namespace mmer {

// q, k, v, grad_out and out need unit stride within a token; any other stride goes, and 16-byte alignment goes faster.
// Returns cudaErrorInvalidValue for an unknown dtype, an unsupported width or a grid too large, else the launch's own
// error.
cudaError_t attention_forward_cuda(const AttentionForwardArgs& args, cudaStream_t stream);

// Writes `delta` and every gradient that is asked for. Up to four launches, one after the other on the stream.
cudaError_t attention_backward_cuda(const AttentionBackwardArgs& args, cudaStream_t stream);

}  // namespace mmer
