// gram_inverse: reverse_cholesky, then the lower triangle of the inverse, as a solve of the rows of the identity. Only the columns
// up to the diagonal are computed.
//
// Floor: columns^3 / 3 multiply-adds, columns^3 / 2 with the factorisation.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/triangular_solver.h"

namespace sparsekern::cpu {

double gram_inverse(const float* gram, int64_t columns, double damping, float* inverse, const Executor& executor) {
  const auto factor = allocate<float>(columns * columns);
  const double used = reverse_cholesky(gram, columns, damping, factor.get(), executor, kResolvedPivot);
  PanelMatrix x(columns, columns);
  parallel_for(executor, x.panels(), 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      std::fill_n(x.at(panel, 0), x.stride(), 0.0f);
      for (int64_t lane = 0; lane < x.rows_of(panel); ++lane) x.at(panel, panel * kLanes + lane)[lane] = 1.0f;
    }
  });
  TriangularSolver(factor.get(), columns, executor).solve(x, true);
  x.store(inverse, executor);
  gram_symmetrize_(inverse, columns, executor);
  return used;
}

}  // namespace sparsekern::cpu
