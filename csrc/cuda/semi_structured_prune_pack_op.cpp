#include <optional>
#include <tuple>

#include "cuda/kernels.h"
#include "cuda/tensors.h"
#include "stable/semi_structured_tensors.h"

namespace sparsekern::cuda {

namespace {

std::tuple<Tensor, Tensor, Tensor> semi_structured_prune_pack_of(Tensor weight, std::optional<Tensor> scores) {
  const DType dtype = dtype_of(weight, "weight: expected dtype float32, bfloat16 or float16");
  check_contiguous(weight, "weight: expected contiguous memory");
  DType scores_dtype = dtype;
  if (scores) {
    scores_dtype = dtype_of(*scores, "scores: expected dtype float32, bfloat16 or float16");
    check(
        weight.dim() == 2 && scores->dim() == 2 && scores->size(0) == weight.size(0) && scores->size(1) == weight.size(1),
        "scores: expected the shape of weight");
    check_contiguous(*scores, "scores: expected contiguous memory");
    check_same_device(weight, *scores, "scores: expected the device of weight");
  }
  const DeviceGuard guard(weight);
  const semi_structured::Packed packed = semi_structured::new_packed(weight);
  const Tensor source = aligned(weight);
  if (scores) scores = aligned(*scores);
  Tensor status = new_status(weight);
  semi_structured_prune_pack(
      source.const_data_ptr(), dtype, scores ? scores->const_data_ptr() : nullptr, scores_dtype, weight.size(0), weight.size(1),
      packed.values.mutable_data_ptr(), packed.meta.mutable_data_ptr(), data_of<int>(status), current_stream(weight));
  return {packed.values, packed.meta, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern_cuda, m) {
  m.def("semi_structured_prune_pack(Tensor weight, Tensor? scores=None) -> (Tensor values, Tensor meta, Tensor status)");
}
STABLE_TORCH_LIBRARY_IMPL(sparsekern_cuda, SPARSEKERN_DEVICE_KEY, m) {
  m.impl("semi_structured_prune_pack", TORCH_BOX(&semi_structured_prune_pack_of));
}

}  // namespace sparsekern::cuda
