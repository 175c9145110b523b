// The CUDA side of the bindings. The stream comes from a symbol that only a CUDA libtorch exports: declared weak, so
// that one library loads on a CPU torch and a CUDA torch alike. It is found by way of libtorch.so, which the library
// therefore names among those it needs though it takes nothing else from it.
#pragma once

#ifdef MMER_WITH_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace mmer {

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
                  "torch gave no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error, const char* what) {
  if (error != cudaSuccess) cudaGetLastError();  // takes it: the next launch asks for the last error too
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

}  // namespace mmer
#endif
