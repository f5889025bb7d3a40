#include <tuple>

#include "cpu/tensors.h"
#include "stable/semi_structured_tensors.h"

namespace sparsekern::cpu {

namespace {

std::tuple<Tensor, Tensor> semi_structured_pack_of(Tensor weight) {
  const semi_structured::Type type = semi_structured::type_of(weight, "weight: expected dtype bfloat16, float16, float32 or int8");
  semi_structured::Packed packed = semi_structured::new_packed(weight);
  const Tensor dense = torch::stable::contiguous(weight);
  semi_structured_pack(
      dense.const_data_ptr(), type, weight.size(0), weight.size(1), packed.values.mutable_data_ptr(),
      packed.meta.mutable_data_ptr(), torch_executor());
  return {packed.values, packed.meta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("semi_structured_pack", TORCH_BOX(&semi_structured_pack_of)); }

}  // namespace sparsekern::cpu
