#include <tuple>

#include "common/nm_q4.h"
#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

std::tuple<Tensor, Tensor> obs_quantize_of(Tensor weight, Tensor factor, Tensor mask, Tensor scales) {
  check(weight.dim() == 2 && weight.scalar_type() == ScalarType::Float, "weight: expected float32 [rows, columns]");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  check_square_float(factor, "factor: expected float32 [columns, columns]");
  check(factor.size(0) == columns, "factor: expected float32 [columns, columns]");
  check_like(mask, weight, ScalarType::Bool, "mask: expected bool of the shape of weight");
  check(
      scales.dim() == 2 && scales.size(0) == rows && scales.size(1) == nm_q4::blocks(columns) &&
          scales.scalar_type() == ScalarType::Half,
      "scales: expected float16 [rows, ceil(columns / 64)]");
  const Tensor dense_weight = torch::stable::contiguous(weight), dense_factor = torch::stable::contiguous(factor);
  const Tensor dense_mask = torch::stable::contiguous(mask), dense_scales = torch::stable::contiguous(scales);
  Tensor new_weight = torch::stable::new_empty(weight, {rows, columns});
  Tensor row_error = torch::stable::new_empty(weight, {rows});
  obs_quantize(
      const_float_data(dense_weight), const_float_data(dense_factor), byte_data(dense_mask), dense_scales.const_data_ptr(), rows,
      columns, float_data(new_weight), float_data(row_error), torch_executor());
  return {new_weight, row_error};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("obs_quantize", TORCH_BOX(&obs_quantize_of)); }

}  // namespace sparsekern::cpu
