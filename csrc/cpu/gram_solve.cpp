// gram_solve: reverse_cholesky, then a solve of every row with the factor. The solve takes most of the time
// (triangular_solver.cpp).
#include "cpu/finite.h"
#include "cpu/kernels.h"
#include "cpu/triangular_solver.h"

namespace sparsekern::cpu {

double gram_solve(
    const float* gram, const float* cross, int64_t rows, int64_t columns, double damping, float* solution,
    const Executor& executor) {
  require_finite("cross", cross, DType::f32, rows, columns, nullptr, executor);
  const auto factor = allocate<float>(columns * columns);
  const double used = reverse_cholesky(gram, columns, damping, factor.get(), executor, kResolvedPivot);
  PanelMatrix x(rows, columns);
  x.load(cross, executor);
  TriangularSolver(factor.get(), columns, executor).solve(x);
  x.store(solution, executor);
  return used;
}

}  // namespace sparsekern::cpu
