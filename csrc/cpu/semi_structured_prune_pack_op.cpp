#include <tuple>

#include "cpu/tensors.h"
#include "stable/semi_structured_tensors.h"

namespace sparsekern::cpu {

namespace {

std::tuple<Tensor, Tensor> semi_structured_prune_pack_of(Tensor weight, std::optional<Tensor> scores) {
  const DType dtype = dtype_of(weight, "weight: expected dtype float32, bfloat16 or float16");
  semi_structured::Packed packed = semi_structured::new_packed(weight);
  const Tensor dense = torch::stable::contiguous(weight);
  DType scores_dtype = dtype;
  if (scores) {
    scores_dtype = dtype_of(*scores, "scores: expected dtype float32, bfloat16 or float16");
    check(
        scores->dim() == 2 && scores->size(0) == weight.size(0) && scores->size(1) == weight.size(1),
        "scores: expected the shape of weight");
    scores = torch::stable::contiguous(*scores);
  }
  semi_structured_prune_pack(
      dense.const_data_ptr(), dtype, scores ? scores->const_data_ptr() : nullptr, scores_dtype, weight.size(0), weight.size(1),
      packed.values.mutable_data_ptr(), packed.meta.mutable_data_ptr(), torch_executor());
  return {packed.values, packed.meta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("semi_structured_prune_pack", TORCH_BOX(&semi_structured_prune_pack_of)); }

}  // namespace sparsekern::cpu
