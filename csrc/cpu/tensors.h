// Helpers of the stable-ABI wrappers of CPU kernels, in addition to stable/tensors.h: contiguous operands, and torch's thread pool.
#pragma once

#include "stable/errors.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "cpu/kernels.h"
#include "stable/tensors.h"

namespace sparsekern::cpu {

inline Executor torch_executor() {
  return {
      static_cast<int>(torch::stable::get_num_threads()),
      [](int64_t begin, int64_t end, int64_t grain, Executor::RangeFunction function, void* context) {
        torch::stable::parallel_for(
            begin, end, grain, [=](int64_t range_begin, int64_t range_end) { function(range_begin, range_end, context); });
      }};
}

inline float* float_data(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

inline const float* const_float_data(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

inline void check_square_float(const Tensor& tensor, const char* message) {
  check(tensor.dim() == 2 && tensor.size(0) == tensor.size(1) && tensor.scalar_type() == ScalarType::Float, message);
}

// A contiguous row mask, copied if needed, kept alive beside its pointer.
struct RowMask {
  std::optional<Tensor> tensor;
  const uint8_t* data = nullptr;

  RowMask(const std::optional<Tensor>& row_mask, int64_t tokens) {
    if (!row_mask) return;
    check(
        row_mask->dim() == 1 && row_mask->size(0) == tokens && row_mask->scalar_type() == ScalarType::Bool,
        "row_mask: expected one bool a token");
    tensor = torch::stable::contiguous(*row_mask);
    data = static_cast<const uint8_t*>(tensor->const_data_ptr());
  }
};

// Runs f on contiguous memory and copies the result back if the caller's tensor is strided.
template <class F>
inline void in_place(Tensor& tensor, const F& f) {
  Tensor dense = torch::stable::contiguous(tensor);
  f(dense);
  if (dense.data_ptr() != tensor.data_ptr()) torch::stable::copy_(tensor, dense);
}

inline Tensor new_mask(const Tensor& scores) {
  return torch::stable::new_empty(scores, {scores.size(0), scores.size(1)}, ScalarType::Bool);
}

inline uint8_t* byte_data(const Tensor& tensor) { return static_cast<uint8_t*>(tensor.mutable_data_ptr()); }

inline void check_like(const Tensor& tensor, const Tensor& weight, ScalarType type, const char* message) {
  check(
      tensor.dim() == 2 && tensor.size(0) == weight.size(0) && tensor.size(1) == weight.size(1) && tensor.scalar_type() == type,
      message);
}

}  // namespace sparsekern::cpu
