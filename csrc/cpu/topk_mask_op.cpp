#include <string>

#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

Tensor topk_mask_of(Tensor scores, int64_t k, std::string scope) {
  const DType dtype = dtype_of(scores, "scores: expected dtype float32, bfloat16 or float16");
  check(scores.dim() == 2, "scores: expected 2 dimensions");
  check(scope == "row" || scope == "matrix", "scope: expected row or matrix");
  check(k >= 0 && k <= (scope == "row" ? scores.size(1) : scores.numel()), "k: expected 0 to the number of scores");
  const Tensor dense = torch::stable::contiguous(scores);
  Tensor mask = new_mask(scores);
  if (scores.size(1) == 0) return mask;  // of any number of rows
  topk_mask(dense.const_data_ptr(), dtype, scores.size(0), scores.size(1), k, scope == "matrix", byte_data(mask), torch_executor());
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("topk_mask", TORCH_BOX(&topk_mask_of)); }

}  // namespace sparsekern::cpu
