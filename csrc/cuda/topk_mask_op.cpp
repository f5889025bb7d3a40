#include <string>
#include <tuple>

#include "cuda/kernels.h"
#include "cuda/tensors.h"

namespace sparsekern::cuda {

namespace {

std::tuple<Tensor, Tensor> topk_mask_of(Tensor scores, int64_t k, std::string scope) {
  const DType dtype = dtype_of(scores, "scores: expected dtype float32, bfloat16 or float16");
  check(scores.dim() == 2, "scores: expected 2 dimensions");
  check_contiguous(scores, "scores: expected contiguous memory");
  check(scope == "row" || scope == "matrix", "scope: expected row or matrix");
  const bool whole_matrix = scope == "matrix";
  check(k >= 0 && k <= (whole_matrix ? scores.numel() : scores.size(1)), "k: expected 0 to the number of scores");
  const DeviceGuard guard(scores);
  Tensor mask = torch::stable::new_empty(scores, {scores.size(0), scores.size(1)}, ScalarType::Bool);
  Tensor status = new_status(scores);
  const int64_t bytes = topk_mask_workspace(dtype, scores.size(0), scores.size(1), whole_matrix);
  Tensor workspace = torch::stable::new_empty(scores, {(bytes + 7) / 8}, ScalarType::Long);
  topk_mask(
      scores.const_data_ptr(), dtype, scores.size(0), scores.size(1), k, whole_matrix, data_of<uint8_t>(mask),
      workspace.mutable_data_ptr(), data_of<int>(status), current_stream(scores));
  return {mask, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern_cuda, m) {
  m.def("topk_mask(Tensor scores, int k, str scope) -> (Tensor mask, Tensor status)");
}
STABLE_TORCH_LIBRARY_IMPL(sparsekern_cuda, SPARSEKERN_DEVICE_KEY, m) { m.impl("topk_mask", TORCH_BOX(&topk_mask_of)); }

}  // namespace sparsekern::cuda
