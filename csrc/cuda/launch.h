// What every launch needs: the caller's device and stream, and a check that the kernel was accepted.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace sparsekern::cuda {

// The stream that torch would use now on the tensor's device. (A torch StreamId is not a cudaStream_t; only this call gives one.)
inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes the tensor's device the current one for a scope.
inline torch::stable::accelerator::DeviceGuard device_guard(const torch::stable::Tensor& tensor) {
  return torch::stable::accelerator::DeviceGuard(tensor.get_device_index());
}

}  // namespace sparsekern::cuda
