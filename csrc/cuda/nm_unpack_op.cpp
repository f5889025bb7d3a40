#include <tuple>

#include "cuda/kernels.h"
#include "cuda/nm_tensors.h"

namespace sparsekern::cuda {

namespace {

std::tuple<Tensor, Tensor> nm_unpack_of(Tensor values, Tensor meta) {
  nm_type_of(values, "values: expected dtype bfloat16, float16, float32 or int8");
  const auto element_size = static_cast<int>(values.element_size());
  const nm::Format format = nm::format_of(element_size);
  check(values.dim() == 2 && meta.dim() == 2, "values, meta: expected 2 dimensions");
  const int64_t rows = values.size(0), columns = 2 * values.size(1);
  check(
      rows % format.row_multiple == 0 && columns % format.column_multiple() == 0, "values: expected a shape that the layout divides");
  check(
      meta.scalar_type() == nm_word_type(format) && meta.size(0) == rows && meta.size(1) == columns / format.columns_per_word(),
      "meta: expected the dtype and shape that go with values");
  check_contiguous(values, "values: expected contiguous memory");
  check_contiguous(meta, "meta: expected contiguous memory");
  check_same_device(values, meta, "meta: expected the device of values");
  const DeviceGuard guard(values);
  const Tensor stored = aligned(values), words = aligned(meta);
  Tensor weight = torch::stable::new_empty(values, {rows, columns});
  Tensor status = new_status(values);
  nm_unpack(
      stored.const_data_ptr(), words.const_data_ptr(), element_size, rows, columns, weight.mutable_data_ptr(), data_of<int>(status),
      current_stream(values));
  return {weight, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern_cuda, m) { m.def("nm_unpack(Tensor values, Tensor meta) -> (Tensor weight, Tensor status)"); }
STABLE_TORCH_LIBRARY_IMPL(sparsekern_cuda, SPARSEKERN_DEVICE_KEY, m) { m.impl("nm_unpack", TORCH_BOX(&nm_unpack_of)); }

}  // namespace sparsekern::cuda
