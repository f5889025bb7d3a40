// Checks shared by the stable-ABI wrappers of the CPU and CUDA kernels, which keep a kernel inside its memory. They guard direct
// calls of torch.ops; the Python wrappers give friendlier messages about shapes and dtypes.
#pragma once

#include "stable/errors.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#include "common/dtype.h"

namespace sparsekern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline DType dtype_of(const Tensor& tensor, const char* message) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: throw std::invalid_argument(message);
  }
}

}  // namespace sparsekern
