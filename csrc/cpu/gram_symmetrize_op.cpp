#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

void gram_symmetrize_of(Tensor gram) {
  check_square_float(gram, "gram: expected a square float32 matrix");
  in_place(gram, [](Tensor& dense) { gram_symmetrize_(float_data(dense), dense.size(0), torch_executor()); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("gram_symmetrize_", TORCH_BOX(&gram_symmetrize_of)); }

}  // namespace sparsekern::cpu
