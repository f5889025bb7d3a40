#include "cuda/decode_tensors.h"

namespace sparsekern::cuda {

namespace {

constexpr int64_t kPartStored = 64;  // values of a row that the kernel takes at once

Tensor nm_linear_of(Tensor x, Tensor values, Tensor codes, int64_t n, std::optional<Tensor> bias) {
  check_half(x);
  check(n == 1 || n == 2, "n: expected 1 or 2 of every four columns");
  check(values.dim() == 2 && values.scalar_type() == x.scalar_type(), "values: expected [rows, stored] of the dtype of x");
  const int64_t rows = values.size(0), columns = as_tokens(x).size(1);
  DecodeTensors tensors(x, rows, bias, 4 * kPartStored / n);
  check(values.size(1) == columns / 4 * n, "values: expected n of every four columns");
  check(codes.dim() == 2 && codes.scalar_type() == ScalarType::Int, "codes: expected int32 [rows, words]");
  check(codes.size(0) == rows && codes.size(1) == columns / 64 * n, "codes: expected two bits for each value");
  for (const Tensor* tensor : {&values, &codes}) {
    check_contiguous(*tensor, "values, codes: expected contiguous memory");
    check_same_device(*tensor, x, "values, codes: expected the device of x");
  }
  if (tensors.is_empty()) return tensors.y;
  const DeviceGuard guard(x);
  const Tensor stored = aligned(values), positions = aligned(codes);
  tensors.allocate(nm_linear_workspace(tensors.call));
  nm_linear(
      tensors.call, stored.const_data_ptr(), static_cast<const uint32_t*>(positions.const_data_ptr()), static_cast<int>(n),
      current_stream(x));
  return tensors.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern_cuda, m) {
  m.def("nm_linear(Tensor x, Tensor values, Tensor codes, int n, Tensor? bias) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sparsekern_cuda, SPARSEKERN_DEVICE_KEY, m) { m.impl("nm_linear", TORCH_BOX(&nm_linear_of)); }

}  // namespace sparsekern::cuda
