#include <tuple>

#include "cpu/packed_tensors.h"

namespace sparsekern::cpu {

namespace {

std::tuple<Tensor, Tensor> nm_pack_of(Tensor weight, int64_t n, int64_t m) {
  const DType dtype = dtype_of(weight, "weight: expected dtype float32, bfloat16 or float16");
  NmTensors::check_nm(n, m);
  check(weight.dim() == 2 && weight.size(1) % m == 0, "weight: expected 2 dimensions, the columns divisible by m");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const int64_t stored = packed_rows::stored_per_row(columns, n, m, size_of(dtype));
  const Tensor dense_weight = dense(weight);
  Tensor values = torch::stable::new_empty(weight, {rows, stored});
  Tensor codes = torch::stable::new_empty(weight, {rows, stored * packed_rows::code_bits(m) / 32}, ScalarType::Int);
  nm_pack(
      dense_weight.const_data_ptr(), dtype, rows, columns, n, m, values.mutable_data_ptr(),
      static_cast<uint32_t*>(codes.mutable_data_ptr()), torch_executor());
  return {values, codes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("nm_pack", TORCH_BOX(&nm_pack_of)); }

}  // namespace sparsekern::cpu
