// Launchers of the CUDA weight perturbation. Pointers are device pointers, except args.tensors and the structs
// themselves: what the kernels need of those travels in the launch.
//
// One launch for the norms and one that moves the weights, one launch to restore, for up to kPerturbationTensors
// tensors of any sizes; more take further launches. No host synchronisation, no allocation, no copy from the host: safe
// to capture in a CUDA graph. No atomics: the same inputs give the same bits, however many blocks share the work.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/perturbation_args.h"

namespace mmer {

// Whose table fits into the parameters of one launch: 32,764 bytes from CUDA 12.1 on, 4096 before.
#if CUDART_VERSION >= 12010
inline constexpr int kPerturbationTensors = 1000;
#else
inline constexpr int kPerturbationTensors = 120;
#endif

// Bytes of device memory, at least 8, that the launchers of norms and of the step need; aligned to 8.
int64_t perturbation_workspace_cuda(const PerturbationArgs& args);

// Writes args.norms, and args.weight_norms with scope awp. Another launch turns the parts of norms into norms.
cudaError_t perturbation_norm_cuda(const PerturbationArgs& args, void* workspace, cudaStream_t stream);

// Stash, step, args.norms and args.factors, and args.weight_norms with scope awp; computes the norms first unless they
// are given, those of the weights too with scope awp.
cudaError_t perturbation_apply_cuda(const PerturbationArgs& args, void* workspace, cudaStream_t stream);

// weight = stash of every tensor.
cudaError_t perturbation_restore_cuda(const PerturbationTensor* tensors, int64_t count, cudaStream_t stream);

}  // namespace mmer
