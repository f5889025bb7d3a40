#include "common/nm_q4.h"
#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

Tensor q4_scales_of(Tensor weight, Tensor importance) {
  check(weight.dim() == 2 && weight.scalar_type() == ScalarType::Float, "weight: expected float32 [rows, columns]");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  check(
      importance.dim() == 1 && importance.size(0) == columns && importance.scalar_type() == ScalarType::Float,
      "importance: expected float32 [columns]");
  const Tensor dense_weight = torch::stable::contiguous(weight), dense_importance = torch::stable::contiguous(importance);
  Tensor scales = torch::stable::new_empty(weight, {rows, nm_q4::blocks(columns)}, ScalarType::Half);
  q4_scales(
      const_float_data(dense_weight), const_float_data(dense_importance), rows, columns, scales.mutable_data_ptr(),
      torch_executor());
  return scales;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("q4_scales", TORCH_BOX(&q4_scales_of)); }

}  // namespace sparsekern::cpu
