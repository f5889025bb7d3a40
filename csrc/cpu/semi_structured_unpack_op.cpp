#include "cpu/tensors.h"
#include "stable/semi_structured_tensors.h"

namespace sparsekern::cpu {

namespace {

Tensor semi_structured_unpack_of(Tensor values, Tensor meta) {
  semi_structured::check_packed(values, meta);
  const int64_t rows = values.size(0), columns = 2 * values.size(1);
  const Tensor dense_values = torch::stable::contiguous(values);
  const Tensor dense_meta = torch::stable::contiguous(meta);
  Tensor weight = torch::stable::new_empty(values, {rows, columns});
  semi_structured_unpack(
      dense_values.const_data_ptr(), dense_meta.const_data_ptr(), static_cast<int>(values.element_size()), rows, columns,
      weight.mutable_data_ptr(), torch_executor());
  return weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("semi_structured_unpack", TORCH_BOX(&semi_structured_unpack_of)); }

}  // namespace sparsekern::cpu
