// Helpers of the stable-ABI wrappers of CUDA kernels (<op>_op.cpp), in addition to stable/tensors.h: the device and torch's current
// stream.
//
// With SPARSEKERN_SIMT the same wrappers serve CPU tensors, through kernels that csrc/testing/simt runs on the CPU.
#pragma once

#include "stable/errors.h"

#include <torch/csrc/stable/library.h>
#ifndef SPARSEKERN_SIMT
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include <cuda_runtime_api.h>

#include <cstdint>

#include "stable/tensors.h"

#ifdef SPARSEKERN_SIMT
#define SPARSEKERN_DEVICE_KEY CPU
#else
#define SPARSEKERN_DEVICE_KEY CUDA
#endif

namespace sparsekern::cuda {

#ifdef SPARSEKERN_SIMT
struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};
inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
#else
struct DeviceGuard {
  explicit DeviceGuard(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// Returns torch's current stream on the tensor's device. (A torch StreamId is not a cudaStream_t; only this call gives one.)
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

// sparsekern.backends calls raw ops with contiguous tensors on one device; these checks keep a direct call inside memory.
inline void check_contiguous(const Tensor& tensor, const char* message) { check(tensor.is_contiguous(), message); }

inline void check_same_device(const Tensor& a, const Tensor& b, const char* message) {
  check(a.get_device_index() == b.get_device_index(), message);
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Returns the tensor, copied if its address is not a multiple of 16, for kernels that read vectors: a contiguous view may begin at
// any element.
inline Tensor aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

// Returns a cleared word on the tensor's device, for the bits of cuda/status.h.
inline Tensor new_status(const Tensor& like) {
  Tensor status = torch::stable::new_empty(like, {}, ScalarType::Int);
  torch::stable::zero_(status);
  return status;
}

}  // namespace sparsekern::cuda
