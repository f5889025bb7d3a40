#include "cpu/packed_linear_tensors.h"

namespace sparsekern::cpu {

namespace {

Tensor bitmask_linear_of(Tensor x, Tensor values, Tensor bitmask, Tensor starts, Tensor order, std::optional<Tensor> bias) {
  check(order.dim() == 1, "order: expected int32 [rows]");
  const LinearTensors linear(x, values, order.size(0), bias);
  const BitmaskTensors packed(values, bitmask, starts, order, linear.dtype, linear.columns);
  if (packed.rows.rows == 0) return linear.y;  // without allocating activations, however many tokens there are
  if (linear.wants_dense_weight()) {
    return linear.multiply_dense(packed.rows.rows, [&](void* weight) {
      bitmask_expand(packed.rows, linear.dtype, linear.columns, weight, torch_executor());
    });
  }
  bitmask_linear(
      linear.x.const_data_ptr(), linear.dtype, linear.tokens, linear.columns, packed.rows, linear.bias_data(),
      linear.y.mutable_data_ptr(), torch_executor());
  return linear.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("bitmask_linear", TORCH_BOX(&bitmask_linear_of)); }

}  // namespace sparsekern::cpu
