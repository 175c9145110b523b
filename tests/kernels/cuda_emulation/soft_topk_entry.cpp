// The launchers of kernels/cuda/soft_topk.h for ctypes, on the structs of soft_topk_launch.py.
#include "../../../kernels/cuda/soft_topk.h"

extern "C" {

int soft_topk_forward(const mmer::SoftTopKForwardArgs* args) { return mmer::soft_topk_forward_cuda(*args, nullptr); }

int soft_topk_backward(const mmer::SoftTopKBackwardArgs* args) { return mmer::soft_topk_backward_cuda(*args, nullptr); }

}  // extern "C"
