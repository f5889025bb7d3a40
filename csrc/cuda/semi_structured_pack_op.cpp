#include <tuple>

#include "cuda/kernels.h"
#include "cuda/tensors.h"
#include "stable/semi_structured_tensors.h"

namespace sparsekern::cuda {

namespace {

std::tuple<Tensor, Tensor, Tensor> semi_structured_pack_of(Tensor weight) {
  const semi_structured::Type type = semi_structured::type_of(weight, "weight: expected dtype bfloat16, float16, float32 or int8");
  check_contiguous(weight, "weight: expected contiguous memory");
  const DeviceGuard guard(weight);
  const semi_structured::Packed packed = semi_structured::new_packed(weight);
  const Tensor source = aligned(weight);
  Tensor status = new_status(weight);
  semi_structured_pack(
      source.const_data_ptr(), type, weight.size(0), weight.size(1), packed.values.mutable_data_ptr(),
      packed.meta.mutable_data_ptr(), data_of<int>(status), current_stream(weight));
  return {packed.values, packed.meta, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern_cuda, m) {
  m.def("semi_structured_pack(Tensor weight) -> (Tensor values, Tensor meta, Tensor status)");
}
STABLE_TORCH_LIBRARY_IMPL(sparsekern_cuda, SPARSEKERN_DEVICE_KEY, m) {
  m.impl("semi_structured_pack", TORCH_BOX(&semi_structured_pack_of));
}

}  // namespace sparsekern::cuda
