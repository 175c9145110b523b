// The launchers of kernels/cuda/perturbation.h for ctypes, on the structs of perturbation_launch.py.
#include "../../../kernels/cuda/perturbation.h"

extern "C" {

int perturbation_tensors() { return mmer::kPerturbationTensors; }

int64_t perturbation_workspace(const mmer::PerturbationArgs* args) { return mmer::perturbation_workspace_cuda(*args); }

int perturbation_norm(const mmer::PerturbationArgs* args, void* workspace) {
  return mmer::perturbation_norm_cuda(*args, workspace, nullptr);
}

int perturbation_apply(const mmer::PerturbationArgs* args, void* workspace) {
  return mmer::perturbation_apply_cuda(*args, workspace, nullptr);
}

int perturbation_restore(const mmer::PerturbationTensor* tensors, int64_t count) {
  return mmer::perturbation_restore_cuda(tensors, count, nullptr);
}

}  // extern "C"
