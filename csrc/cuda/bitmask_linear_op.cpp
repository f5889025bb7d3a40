#include "common/packed_rows.h"
#include "cuda/decode_tensors.h"

namespace sparsekern::cuda {

namespace {

Tensor bitmask_linear_of(
    Tensor x, Tensor values, Tensor bitmask, Tensor starts, Tensor order, std::optional<Tensor> bias,
    std::optional<Tensor> status) {
  check_half(x);
  check(order.dim() == 1 && order.scalar_type() == ScalarType::Int, "order: expected int32 [rows]");
  const int64_t rows = order.size(0), columns = as_tokens(x).size(1);
  DecodeTensors tensors(x, rows, bias, packed_rows::kWordColumns);
  check(values.dim() == 1 && values.scalar_type() == x.scalar_type(), "values: expected [stored] of the dtype of x");
  check(values.size(0) % 2 == 0 && values.size(0) >= 2 * packed_rows::kSlack, "values: expected whole slots, 64 of them spare");
  check(bitmask.dim() == 2 && bitmask.scalar_type() == ScalarType::Long, "bitmask: expected int64 [rows, words]");
  check(bitmask.size(0) == rows && bitmask.size(1) == packed_rows::words(columns), "bitmask: expected the rows and columns");
  check(starts.dim() == 1 && starts.scalar_type() == ScalarType::Long, "starts: expected int64 [tiles + 1]");
  check(starts.size(0) == packed_rows::tiles(rows) + 1, "starts: expected one more than there are tiles");
  check(!status.has_value() || (status->numel() == 1 && status->scalar_type() == ScalarType::Int), "status: expected an int32");
  for (const Tensor* tensor : {&values, &bitmask, &starts, &order}) {
    check_contiguous(*tensor, "values, bitmask, starts, order: expected contiguous memory");
    check_same_device(*tensor, x, "values, bitmask, starts, order: expected the device of x");
  }
  if (tensors.is_empty()) return tensors.y;
  const DeviceGuard guard(x);
  const Tensor slots = aligned(values), bits = aligned(bitmask);
  const DecodeBitmask weight = {
      static_cast<const uint32_t*>(slots.const_data_ptr()), values.size(0) / 2,
      static_cast<const uint64_t*>(bits.const_data_ptr()),  static_cast<const int64_t*>(starts.const_data_ptr()),
      static_cast<const int32_t*>(order.const_data_ptr()),  status.has_value() ? data_of<int>(*status) : nullptr};
  tensors.allocate(bitmask_linear_workspace(tensors.call));
  bitmask_linear(tensors.call, weight, current_stream(x));
  return tensors.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern_cuda, m) {
  m.def(
      "bitmask_linear(Tensor x, Tensor values, Tensor bitmask, Tensor starts, Tensor order, Tensor? bias, Tensor(a!)? status) "
      "-> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sparsekern_cuda, SPARSEKERN_DEVICE_KEY, m) { m.impl("bitmask_linear", TORCH_BOX(&bitmask_linear_of)); }

}  // namespace sparsekern::cuda
