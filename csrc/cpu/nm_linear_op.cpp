#include "cpu/packed_linear_tensors.h"

namespace sparsekern::cpu {

namespace {

Tensor nm_linear_of(Tensor x, Tensor values, Tensor codes, int64_t n, int64_t m, std::optional<Tensor> bias) {
  check(values.dim() == 2, "values, codes: expected 2 dimensions");
  const LinearTensors linear(x, values, values.size(0), bias);
  const NmTensors packed(values, codes, n, m, linear.dtype, linear.columns);
  if (packed.rows.rows == 0) return linear.y;  // without allocating activations, however many tokens there are
  if (linear.wants_dense_weight()) {
    return linear.multiply_dense(
        packed.rows.rows, [&](void* weight) { nm_expand(packed.rows, linear.dtype, linear.columns, weight, torch_executor()); });
  }
  nm_linear(
      linear.x.const_data_ptr(), linear.dtype, linear.tokens, linear.columns, packed.rows, linear.bias_data(),
      linear.y.mutable_data_ptr(), torch_executor());
  return linear.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("nm_linear", TORCH_BOX(&nm_linear_of)); }

}  // namespace sparsekern::cpu
