#include <tuple>

#include "cuda/kernels.h"
#include "cuda/tensors.h"

namespace sparsekern::cuda {

namespace {

std::tuple<Tensor, Tensor> nm_mask_of(Tensor scores, int64_t n, int64_t m) {
  const DType dtype = dtype_of(scores, "scores: expected dtype float32, bfloat16 or float16");
  check(scores.dim() == 2, "scores: expected 2 dimensions");
  check(n >= 1 && n < m && m <= 64, "n, m: expected 1 <= n < m <= 64");
  check(scores.size(1) % m == 0, "scores: expected columns divisible by m");
  check_contiguous(scores, "scores: expected contiguous memory");
  const DeviceGuard guard(scores);
  const Tensor source = aligned(scores);
  Tensor mask = torch::stable::new_empty(scores, {scores.size(0), scores.size(1)}, ScalarType::Bool);
  Tensor status = new_status(scores);
  nm_mask(
      source.const_data_ptr(), dtype, scores.numel() / m, static_cast<int>(n), static_cast<int>(m), data_of<uint8_t>(mask),
      data_of<int>(status), current_stream(scores));
  return {mask, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern_cuda, m) { m.def("nm_mask(Tensor scores, int n, int m) -> (Tensor mask, Tensor status)"); }
STABLE_TORCH_LIBRARY_IMPL(sparsekern_cuda, SPARSEKERN_DEVICE_KEY, m) { m.impl("nm_mask", TORCH_BOX(&nm_mask_of)); }

}  // namespace sparsekern::cuda
