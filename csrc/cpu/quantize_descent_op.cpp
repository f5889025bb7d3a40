#include "common/nm_q4.h"
#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

void quantize_descent_of(Tensor weight, Tensor residual, Tensor hessian, Tensor mask, Tensor scales, int64_t passes) {
  check(weight.dim() == 2 && weight.scalar_type() == ScalarType::Float, "weight: expected float32 [rows, columns]");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  check_like(residual, weight, ScalarType::Float, "residual: expected float32 of the shape of weight");
  check_like(mask, weight, ScalarType::Bool, "mask: expected bool of the shape of weight");
  check_square_float(hessian, "hessian: expected float32 [columns, columns]");
  check(hessian.size(0) == columns, "hessian: expected float32 [columns, columns]");
  check(
      scales.dim() == 2 && scales.size(0) == rows && scales.size(1) == nm_q4::blocks(columns) &&
          scales.scalar_type() == ScalarType::Half,
      "scales: expected float16 [rows, ceil(columns / 64)]");
  const Tensor dense_hessian = torch::stable::contiguous(hessian), dense_mask = torch::stable::contiguous(mask);
  const Tensor dense_scales = torch::stable::contiguous(scales);
  in_place(weight, [&](Tensor& weights) {
    in_place(residual, [&](Tensor& residuals) {
      quantize_descent_(
          float_data(weights), float_data(residuals), const_float_data(dense_hessian), byte_data(dense_mask),
          dense_scales.const_data_ptr(), rows, columns, passes, torch_executor());
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("quantize_descent_", TORCH_BOX(&quantize_descent_of)); }

}  // namespace sparsekern::cpu
