#include <tuple>

#include "cpu/damping.h"

namespace sparsekern::cpu {

namespace {

std::tuple<Tensor, Tensor> reverse_cholesky_of(Tensor gram, double damping) {
  check_square_float(gram, "gram: expected a square float32 matrix");
  const Tensor dense = torch::stable::contiguous(gram);
  return with_damping_used(torch::stable::new_empty(gram, {gram.size(0), gram.size(1)}), gram, [&](float* factor) {
    return cpu::reverse_cholesky(const_float_data(dense), gram.size(0), damping, factor, torch_executor());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("reverse_cholesky", TORCH_BOX(&reverse_cholesky_of)); }

}  // namespace sparsekern::cpu
