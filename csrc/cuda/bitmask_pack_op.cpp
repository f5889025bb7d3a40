#include <tuple>

#include "common/bitmask_layout.h"
#include "cuda/kernels.h"
#include "cuda/tensors.h"

namespace sparsekern::cuda {

namespace {

DType check_weight(const Tensor& weight) {
  const DType dtype = dtype_of(weight, "weight: expected dtype float32, bfloat16 or float16");
  check(weight.dim() == 2, "weight: expected 2 dimensions");
  check_contiguous(weight, "weight: expected contiguous memory");
  return dtype;
}

std::tuple<Tensor, Tensor, Tensor> bitmask_mark_of(Tensor weight) {
  const DType dtype = check_weight(weight);
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const DeviceGuard guard(weight);
  Tensor bitmask = torch::stable::new_empty(weight, {rows, bitmask::bytes_per_row(columns)}, ScalarType::Byte);
  Tensor counts = torch::stable::new_empty(weight, {bitmask_chunks(rows, columns)}, ScalarType::Int);
  Tensor status = new_status(weight);
  bitmask_mark(
      weight.const_data_ptr(), dtype, rows, columns, data_of<uint8_t>(bitmask), data_of<int>(counts), data_of<int>(status),
      current_stream(weight));
  return {bitmask, counts, status};
}

Tensor bitmask_gather_of(Tensor weight, Tensor ends, int64_t count) {
  const DType dtype = check_weight(weight);
  const int64_t rows = weight.size(0), columns = weight.size(1);
  check(
      ends.dim() == 1 && ends.scalar_type() == ScalarType::Long && ends.size(0) == bitmask_chunks(rows, columns),
      "ends: expected int64, one of each chunk");
  check_contiguous(ends, "ends: expected contiguous memory");
  check_same_device(weight, ends, "ends: expected the device of weight");
  check(count >= 0, "count: expected at least 0");
  const DeviceGuard guard(weight);
  Tensor values = torch::stable::new_empty(weight, {count});
  bitmask_gather(
      weight.const_data_ptr(), dtype, rows, columns, static_cast<const int64_t*>(ends.const_data_ptr()), values.mutable_data_ptr(),
      count, current_stream(weight));
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern_cuda, m) {
  m.def("bitmask_mark(Tensor weight) -> (Tensor bitmask, Tensor counts, Tensor status)");
  m.def("bitmask_gather(Tensor weight, Tensor ends, int count) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sparsekern_cuda, SPARSEKERN_DEVICE_KEY, m) {
  m.impl("bitmask_mark", TORCH_BOX(&bitmask_mark_of));
  m.impl("bitmask_gather", TORCH_BOX(&bitmask_gather_of));
}

}  // namespace sparsekern::cuda
