#include "cpu/experts_tensors.h"

namespace sparsekern::cpu {

namespace {

Tensor bitmask_experts_linear_of(
    Tensor x, Tensor experts, Tensor values, Tensor bitmask, Tensor starts, Tensor order, std::optional<Tensor> bias) {
  check(order.dim() == 2, "order: expected int32 [experts, rows]");
  const ExpertsTensors linear(x, experts, values, order.size(0), order.size(1), bias);
  const BitmaskExperts packed(values, bitmask, starts, order, linear.dtype, linear.columns);
  bitmask_experts_linear(
      linear.x.const_data_ptr(), linear.dtype, linear.columns, linear.choice, packed.first, linear.bias_data(),
      linear.y.mutable_data_ptr(), torch_executor());
  return linear.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("bitmask_experts_linear", TORCH_BOX(&bitmask_experts_linear_of)); }

}  // namespace sparsekern::cpu
