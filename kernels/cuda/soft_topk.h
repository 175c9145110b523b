// Launchers of the CUDA soft top-k. Pointers are device pointers, except the argument structs themselves.
//
// One kernel launch each, no host synchronisation, no allocation: safe to capture in a CUDA graph. The result depends
// on the inputs alone (no floating-point atomics), so two runs on one device give the same bits.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/soft_topk_args.h"

namespace mmer {

// Returns cudaErrorInvalidValue for an unknown dtype or a row too long to index, else the launch's own error.
cudaError_t soft_topk_forward_cuda(const SoftTopKForwardArgs& args, cudaStream_t stream);
cudaError_t soft_topk_backward_cuda(const SoftTopKBackwardArgs& args, cudaStream_t stream);

}  // namespace mmer
