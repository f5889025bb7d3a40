#include "cpu/nm_q4_tensors.h"

namespace sparsekern::cpu {

namespace {

Tensor nm_q4_pack_of(Tensor weight, Tensor scales, int64_t n, int64_t m) {
  const DType dtype = dtype_of(weight, "weight: expected dtype float32, bfloat16 or float16");
  const nm_q4::Layout layout = nm_q4_layout(n, m);
  check(weight.dim() == 2 && weight.size(1) % m == 0, "weight: expected 2 dimensions, the columns divisible by m");
  const int64_t rows = weight.size(0), columns = weight.size(1), blocks = nm_q4::blocks(columns);
  check(
      scales.dim() == 2 && scales.size(0) == rows && scales.size(1) == blocks && scales.scalar_type() == ScalarType::Half,
      "scales: expected float16 [rows, ceil(columns / 64)]");
  const Tensor dense_weight = dense(weight), dense_scales = dense(scales);
  Tensor packed = torch::stable::new_empty(weight, {layout.strips(rows), blocks, layout.bytes()}, ScalarType::Byte);
  nm_q4_pack(
      dense_weight.const_data_ptr(), dtype, dense_scales.const_data_ptr(), rows, columns, layout, byte_data(packed),
      torch_executor());
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("nm_q4_pack", TORCH_BOX(&nm_q4_pack_of)); }

}  // namespace sparsekern::cpu
