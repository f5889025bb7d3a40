#include "cuda/kernels.h"
#include "cuda/tensors.h"

namespace sparsekern::cuda {

namespace {

void gram_symmetrize(Tensor gram) {
  check(
      gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.scalar_type() == ScalarType::Float,
      "gram: expected a square float32 matrix");
  check_contiguous(gram, "gram: expected contiguous memory");
  const DeviceGuard guard(gram);
  gram_symmetrize_(data_of<float>(gram), gram.size(0), current_stream(gram));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern_cuda, m) { m.def("gram_symmetrize_(Tensor(a!) gram) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(sparsekern_cuda, SPARSEKERN_DEVICE_KEY, m) { m.impl("gram_symmetrize_", TORCH_BOX(&gram_symmetrize)); }

}  // namespace sparsekern::cuda
