#include "cpu/packed_tensors.h"

namespace sparsekern::cpu {

namespace {

Tensor nm_unpack_of(Tensor values, Tensor codes, int64_t n, int64_t m, int64_t features) {
  const DType dtype = dtype_of(values, "values: expected dtype float32, bfloat16 or float16");
  check(features >= 0, "features: expected at least 0");
  const NmTensors packed(values, codes, n, m, dtype, features);
  Tensor weight = torch::stable::new_empty(values, {packed.rows.rows, features});
  nm_unpack(packed.rows, dtype, features, weight.mutable_data_ptr(), torch_executor());
  return weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("nm_unpack", TORCH_BOX(&nm_unpack_of)); }

}  // namespace sparsekern::cpu
