#include "cpu/packed_tensors.h"

namespace sparsekern::cpu {

namespace {

Tensor bitmask_unpack_of(Tensor values, Tensor bitmask, Tensor starts, Tensor order, int64_t features) {
  const DType dtype = dtype_of(values, "values: expected dtype float32, bfloat16 or float16");
  check(features >= 0, "features: expected at least 0");
  const BitmaskTensors packed(values, bitmask, starts, order, dtype, features);
  Tensor weight = torch::stable::new_empty(values, {packed.rows.rows, features});
  bitmask_unpack(packed.rows, dtype, features, weight.mutable_data_ptr(), torch_executor());
  return weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("bitmask_unpack", TORCH_BOX(&bitmask_unpack_of)); }

}  // namespace sparsekern::cpu
