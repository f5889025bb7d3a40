#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

Tensor nm_mask_of(Tensor scores, int64_t n, int64_t m) {
  const DType dtype = dtype_of(scores, "scores: expected dtype float32, bfloat16 or float16");
  check(scores.dim() == 2, "scores: expected 2 dimensions");
  check(n >= 1 && n < m && m <= 64, "n, m: expected 1 <= n < m <= 64");
  check(scores.size(1) % m == 0, "scores: expected columns divisible by m");
  const Tensor dense = torch::stable::contiguous(scores);
  Tensor mask = new_mask(scores);
  nm_mask(dense.const_data_ptr(), dtype, scores.size(0), scores.size(1), n, m, byte_data(mask), torch_executor());
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("nm_mask", TORCH_BOX(&nm_mask_of)); }

}  // namespace sparsekern::cpu
