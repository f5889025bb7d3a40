#include "common/nm_q4.h"
#include "cuda/decode_tensors.h"

namespace sparsekern::cuda {

namespace {

Tensor nm_q4_linear_of(Tensor x, Tensor blocks, int64_t out_features, std::optional<Tensor> bias) {
  constexpr nm_q4::Layout layout{2, 4};
  const int64_t across = as_tokens(x).size(1) / nm_q4::kColumns;
  check(out_features >= 0, "out_features: expected a number of rows");
  DecodeTensors tensors(x, out_features, bias, nm_q4::kColumns);
  check(
      blocks.dim() == 3 && blocks.scalar_type() == ScalarType::Byte && blocks.size(0) == layout.strips(out_features) &&
          blocks.size(1) == across && blocks.size(2) == layout.bytes(),
      "blocks: expected uint8 [strips, blocks, 208]");
  check_contiguous(blocks, "blocks: expected contiguous memory");
  check_same_device(blocks, x, "blocks: expected the device of x");
  if (tensors.is_empty()) return tensors.y;
  const DeviceGuard guard(x);
  const Tensor stored = aligned(blocks);
  tensors.allocate(nm_q4_linear_workspace(tensors.call));
  nm_q4_linear(tensors.call, stored.const_data_ptr(), current_stream(x));
  return tensors.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern_cuda, m) {
  m.def("nm_q4_linear(Tensor x, Tensor blocks, int out_features, Tensor? bias) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sparsekern_cuda, SPARSEKERN_DEVICE_KEY, m) { m.impl("nm_q4_linear", TORCH_BOX(&nm_q4_linear_of)); }

}  // namespace sparsekern::cuda
