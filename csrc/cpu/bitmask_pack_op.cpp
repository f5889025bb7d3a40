#include <algorithm>
#include <limits>
#include <tuple>

#include "common/packed_rows.h"
#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> bitmask_pack_of(Tensor weight) {
  const DType dtype = dtype_of(weight, "weight: expected dtype float32, bfloat16 or float16");
  check(weight.dim() == 2, "weight: expected 2 dimensions");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  check(rows <= std::numeric_limits<int32_t>::max(), "weight: expected at most 2^31 - 1 rows");
  const Tensor dense = torch::stable::contiguous(weight);
  const BitmaskPlan plan(dense.const_data_ptr(), dtype, rows, columns, torch_executor());
  const int64_t lanes = packed_rows::lanes(size_of(dtype));
  Tensor values = torch::stable::new_empty(weight, {(plan.starts.back() + packed_rows::kSlack) * lanes});
  Tensor bits = torch::stable::new_empty(weight, {rows, packed_rows::words(columns)}, ScalarType::Long);
  Tensor starts = torch::stable::new_empty(weight, {static_cast<int64_t>(plan.starts.size())}, ScalarType::Long);
  Tensor order = torch::stable::new_empty(weight, {rows}, ScalarType::Int);
  std::copy(plan.starts.begin(), plan.starts.end(), static_cast<int64_t*>(starts.mutable_data_ptr()));
  std::copy(plan.order.begin(), plan.order.end(), static_cast<int32_t*>(order.mutable_data_ptr()));
  bitmask_pack(
      plan, dense.const_data_ptr(), dtype, values.mutable_data_ptr(), static_cast<uint64_t*>(bits.mutable_data_ptr()),
      torch_executor());
  return {values, bits, starts, order};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("bitmask_pack", TORCH_BOX(&bitmask_pack_of)); }

}  // namespace sparsekern::cpu
