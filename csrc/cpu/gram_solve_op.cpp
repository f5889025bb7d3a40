#include <tuple>

#include "cpu/damping.h"

namespace sparsekern::cpu {

namespace {

std::tuple<Tensor, Tensor> gram_solve_of(Tensor gram, Tensor cross, double damping) {
  check_square_float(gram, "gram: expected a square float32 matrix");
  check(
      cross.dim() == 2 && cross.size(1) == gram.size(0) && cross.scalar_type() == ScalarType::Float,
      "cross: expected float32 [out_features, features] with the features of gram");
  const Tensor dense = torch::stable::contiguous(gram), dense_cross = torch::stable::contiguous(cross);
  return with_damping_used(torch::stable::new_empty(cross, {cross.size(0), cross.size(1)}), gram, [&](float* solution) {
    return gram_solve(
        const_float_data(dense), const_float_data(dense_cross), cross.size(0), cross.size(1), damping, solution, torch_executor());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("gram_solve", TORCH_BOX(&gram_solve_of)); }

}  // namespace sparsekern::cpu
