// The stable-ABI side of the CUDA kernels: checks that keep a kernel inside its memory, the device, and torch's current stream.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#include "cuda/kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace sparsekern::cuda {

namespace {

// The stream that torch would use now on the tensor's device. (A torch StreamId is not a cudaStream_t; only this call gives one.)
cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void gram_symmetrize(Tensor gram) {
  check(
      gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.scalar_type() == ScalarType::Float,
      "gram: expected a square float32 matrix");
  const torch::stable::accelerator::DeviceGuard guard(gram.get_device_index());
  Tensor dense = torch::stable::contiguous(gram);
  gram_symmetrize_(static_cast<float*>(dense.mutable_data_ptr()), dense.size(0), current_stream(gram));
  if (dense.data_ptr() != gram.data_ptr()) torch::stable::copy_(gram, dense);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CUDA, m) { m.impl("gram_symmetrize_", TORCH_BOX(&gram_symmetrize)); }

}  // namespace sparsekern::cuda

// Importing the module is what loads the library; it has no Python members.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
