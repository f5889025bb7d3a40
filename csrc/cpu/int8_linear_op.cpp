#include "cpu/packed_linear_tensors.h"

namespace sparsekern::cpu {

namespace {

Tensor int8_linear_of(Tensor x, Tensor values, Tensor scales, std::optional<Tensor> bias) {
  check(values.dim() == 2 && values.scalar_type() == ScalarType::Char, "values: expected int8 [out_features, in_features]");
  const LinearTensors linear(x, values.size(0), bias);
  check(values.size(1) == linear.columns, "x: expected the columns of values");
  check(
      scales.dim() == 1 && scales.size(0) == values.size(0) && scales.scalar_type() == ScalarType::Float,
      "scales: expected one float32 for each row");
  const Tensor own_values = dense(values), own_scales = dense(scales);
  const Int8Rows packed{data_of<int8_t>(own_values), const_float_data(own_scales), values.size(0)};
  if (packed.rows == 0) return linear.y;  // without allocating activations, however many tokens there are
  int8_linear(
      linear.x.const_data_ptr(), linear.dtype, linear.tokens, linear.columns, packed, linear.bias_data(),
      linear.y.mutable_data_ptr(), torch_executor());
  return linear.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("int8_linear", TORCH_BOX(&int8_linear_of)); }

}  // namespace sparsekern::cpu
