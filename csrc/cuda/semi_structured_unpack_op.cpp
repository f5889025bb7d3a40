#include <tuple>

#include "cuda/kernels.h"
#include "cuda/tensors.h"
#include "stable/semi_structured_tensors.h"

namespace sparsekern::cuda {

namespace {

std::tuple<Tensor, Tensor> semi_structured_unpack_of(Tensor values, Tensor meta) {
  semi_structured::check_packed(values, meta);
  check_contiguous(values, "values: expected contiguous memory");
  check_contiguous(meta, "meta: expected contiguous memory");
  check_same_device(values, meta, "meta: expected the device of values");
  const DeviceGuard guard(values);
  const int64_t rows = values.size(0), columns = 2 * values.size(1);
  const Tensor stored = aligned(values), words = aligned(meta);
  Tensor weight = torch::stable::new_empty(values, {rows, columns});
  Tensor status = new_status(values);
  semi_structured_unpack(
      stored.const_data_ptr(), words.const_data_ptr(), static_cast<int>(values.element_size()), rows, columns,
      weight.mutable_data_ptr(), data_of<int>(status), current_stream(values));
  return {weight, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern_cuda, m) {
  m.def("semi_structured_unpack(Tensor values, Tensor meta) -> (Tensor weight, Tensor status)");
}
STABLE_TORCH_LIBRARY_IMPL(sparsekern_cuda, SPARSEKERN_DEVICE_KEY, m) {
  m.impl("semi_structured_unpack", TORCH_BOX(&semi_structured_unpack_of));
}

}  // namespace sparsekern::cuda
