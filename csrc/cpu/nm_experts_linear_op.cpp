#include "cpu/experts_tensors.h"

namespace sparsekern::cpu {

namespace {

Tensor nm_experts_linear_of(
    Tensor x, Tensor experts, Tensor values, Tensor codes, int64_t n, int64_t m, std::optional<Tensor> bias) {
  check(values.dim() == 3, "values: expected [experts, rows, stored]");
  const ExpertsTensors linear(x, experts, values, values.size(0), values.size(1), bias);
  const NmExperts packed(values, codes, n, m, linear.dtype, linear.columns);
  nm_experts_linear(
      linear.x.const_data_ptr(), linear.dtype, linear.columns, linear.choice, packed.first, linear.bias_data(),
      linear.y.mutable_data_ptr(), torch_executor());
  return linear.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("nm_experts_linear", TORCH_BOX(&nm_experts_linear_of)); }

}  // namespace sparsekern::cpu
