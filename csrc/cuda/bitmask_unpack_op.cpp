#include <tuple>

#include "common/bitmask_layout.h"
#include "cuda/kernels.h"
#include "cuda/tensors.h"

namespace sparsekern::cuda {

namespace {

void check_bitmask(const Tensor& bitmask, int64_t features) {
  check(
      features >= 0 && bitmask.dim() == 2 && bitmask.scalar_type() == ScalarType::Byte &&
          bitmask.size(1) == bitmask::bytes_per_row(features),
      "bitmask: expected uint8 [rows, ceil(features / 8)]");
  check_contiguous(bitmask, "bitmask: expected contiguous memory");
}

std::tuple<Tensor, Tensor> bitmask_count_of(Tensor bitmask, int64_t features) {
  check_bitmask(bitmask, features);
  const DeviceGuard guard(bitmask);
  Tensor counts = torch::stable::new_empty(bitmask, {bitmask_chunks(bitmask.size(0), features)}, ScalarType::Int);
  Tensor status = new_status(bitmask);
  bitmask_count(
      static_cast<const uint8_t*>(bitmask.const_data_ptr()), bitmask.size(0), features, data_of<int>(counts), data_of<int>(status),
      current_stream(bitmask));
  return {counts, status};
}

Tensor bitmask_expand_of(Tensor values, Tensor bitmask, Tensor ends, int64_t features, Tensor status) {
  const DType dtype = dtype_of(values, "values: expected dtype float32, bfloat16 or float16");
  check(values.dim() == 1, "values: expected 1 dimension");
  check_contiguous(values, "values: expected contiguous memory");
  check_bitmask(bitmask, features);
  check(
      ends.dim() == 1 && ends.scalar_type() == ScalarType::Long && ends.size(0) == bitmask_chunks(bitmask.size(0), features),
      "ends: expected int64, one of each chunk");
  check_contiguous(ends, "ends: expected contiguous memory");
  check(status.numel() == 1 && status.scalar_type() == ScalarType::Int, "status: expected one int32");
  check_same_device(values, bitmask, "bitmask: expected the device of values");
  check_same_device(values, ends, "ends: expected the device of values");
  check_same_device(values, status, "status: expected the device of values");
  const DeviceGuard guard(values);
  Tensor weight = torch::stable::new_empty(values, {bitmask.size(0), features});
  bitmask_expand(
      values.const_data_ptr(), dtype, values.size(0), static_cast<const uint8_t*>(bitmask.const_data_ptr()),
      static_cast<const int64_t*>(ends.const_data_ptr()), bitmask.size(0), features, weight.mutable_data_ptr(),
      data_of<int>(status), current_stream(values));
  return weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern_cuda, m) {
  m.def("bitmask_count(Tensor bitmask, int features) -> (Tensor counts, Tensor status)");
  m.def("bitmask_expand(Tensor values, Tensor bitmask, Tensor ends, int features, Tensor(a!) status) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sparsekern_cuda, SPARSEKERN_DEVICE_KEY, m) {
  m.impl("bitmask_count", TORCH_BOX(&bitmask_count_of));
  m.impl("bitmask_expand", TORCH_BOX(&bitmask_expand_of));
}

}  // namespace sparsekern::cuda
