// Helpers shared by the wrappers of bitmask_linear and nm_linear.
#pragma once

#include <array>
#include <stdexcept>
#include <vector>

#include "cpu/packed_tensors.h"

namespace sparsekern::cpu {

// As torch::stable::new_empty, which is slower: it boxes six arguments for the dispatcher.
inline Tensor new_rows(const Tensor& like, const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= shape[i]) strides[i] = stride;
  int32_t dtype;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Inputs and outputs of a product with packed weights.
struct LinearTensors {
  Tensor x, y;
  std::optional<Tensor> bias;
  DType dtype;
  int64_t tokens, columns;

  LinearTensors(const Tensor& x_, const Tensor& values, int64_t rows, const std::optional<Tensor>& bias_)
      : LinearTensors(x_, rows, bias_) {
    check(values.scalar_type() == x.scalar_type(), "values: expected the dtype of x");
  }

  LinearTensors(const Tensor& x_, int64_t rows, const std::optional<Tensor>& bias_)
      : x(dense(x_)), y(x), dtype(dtype_of(x_, "x: expected dtype float32, bfloat16 or float16")), tokens(1) {
    check(x.dim() > 0, "x: expected at least 1 dimension");
    columns = x.size(x.dim() - 1);
    std::vector<int64_t> shape;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) {
      shape.push_back(x.size(i));
      tokens *= x.size(i);
    }
    shape.push_back(rows);
    y = new_rows(x, shape);
    if (!bias_) return;
    check(
        bias_->dim() == 1 && bias_->size(0) == rows && bias_->scalar_type() == x.scalar_type(),
        "bias: expected one value of the dtype of x for each row");
    bias = dense(*bias_);
  }

  const void* bias_data() const { return bias ? bias->const_data_ptr() : nullptr; }

  // Returns whether to multiply many tokens by the dense weight. With bf16 arithmetic, PyTorch's product is far faster than one in
  // float32, even with the time to expand the weight.
  bool wants_dense_weight() const {
    return tokens > kFewTokens && dtype == DType::bf16 && current_isa() >= Isa::avx512_bf16_emulated;
  }

  template <class Expand>
  Tensor multiply_dense(int64_t rows, const Expand& expand) const {
    Tensor weight = torch::stable::new_empty(x, {rows, columns});
    expand(weight.mutable_data_ptr());
    std::array<StableIValue, 3> stack{
        torch::stable::detail::from(x), torch::stable::detail::from(weight), torch::stable::detail::from(bias)};
    if (torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION) != 0) {
      throw std::runtime_error("torch.nn.functional.linear failed on the expanded weight");
    }
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
};

}  // namespace sparsekern::cpu
