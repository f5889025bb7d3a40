// Tensors of the products of a few tokens with a packed weight (bitmask_linear_op.cpp, nm_linear_op.cpp, nm_q4_linear_op.cpp).
#pragma once

#include <optional>

#include "cuda/kernels.h"
#include "cuda/tensors.h"

namespace sparsekern::cuda {

constexpr int64_t kMostTokens = 16;

// The call with its result and its workspace, which live as long as this.
struct __attribute__((visibility("hidden"))) DecodeTensors {
  Tensor x, y;
  std::optional<Tensor> bias, partials;
  Decode call;

  DecodeTensors(const Tensor& given, int64_t rows, const std::optional<Tensor>& given_bias, int64_t columns_multiple)
      : x(aligned(given)), y(torch::stable::new_empty(given, {given.size(0), rows})), bias(given_bias) {
    const DType dtype = dtype_of(given, "x: expected dtype bfloat16, float16 or float32");
    check(given.size(0) <= kMostTokens, "x: expected at most 16 tokens");
    check(given.size(1) % columns_multiple == 0, "x: expected whole steps of columns");
    if (bias.has_value()) {
      check(bias->dim() == 1 && bias->size(0) == rows && bias->scalar_type() == given.scalar_type(), "bias: expected [rows] as x");
      check_contiguous(*bias, "bias: expected contiguous memory");
      check_same_device(*bias, given, "bias: expected the device of x");
    }
    call = {
        x.const_data_ptr(),
        bias.has_value() ? bias->const_data_ptr() : nullptr,
        y.mutable_data_ptr(),
        nullptr,
        rows,
        given.size(1),
        static_cast<int>(given.size(0)),
        dtype};
  }

  bool is_empty() const { return call.tokens == 0 || call.rows == 0; }

  void allocate(int64_t floats) {
    if (floats == 0) return;
    partials = torch::stable::new_empty(x, {floats}, ScalarType::Float);
    call.partials = data_of<float>(*partials);
  }
};

inline void check_half(const Tensor& x) {
  check(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half, "x: expected dtype bfloat16 or float16");
}

// Raises unless x is a matrix, before anything is made from its sizes.
inline const Tensor& as_tokens(const Tensor& x) {
  check(x.dim() == 2, "x: expected [tokens, columns]");
  check_contiguous(x, "x: expected contiguous memory");
  return x;
}

}  // namespace sparsekern::cuda
