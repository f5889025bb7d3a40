// quantize_descent_: coordinate descent over weights of 4 bits, on a fixed mask and with fixed scales.
//
// Floor: one look at each kept weight and, for each that changes, a multiply-add of a row of H to the row's residual: columns
// multiply-adds. After a sweep that compensates, some hundredths of the weights change in the first pass, and fewer later.
//
// A task takes 16 rows column by column, so that a row of H that one of them needs is in the cache for the others. Their residuals stay
// in the second-level cache.
#include <algorithm>
#include <cstdint>

#include "cpu/dispatch.h"
#include "cpu/finite.h"
#include "cpu/kernels.h"
#include "cpu/nm_q4_activations.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kTogether = 16;

struct Descent {
  float* weight;
  float* residual;
  const float* hessian;
  const uint8_t* mask;
  const Half* scales;
  int64_t columns;
};

// Returns the value on the grid nearest to the least error along column j of a row.
SPARSEKERN_INLINE float best_on_grid(const Descent& d, int64_t row, int64_t j, float curvature) {
  const float scale = to_float(d.scales[row * nm_q4::blocks(d.columns) + j / nm_q4::kColumns]);
  if (scale == 0.0f) return 0.0f;
  const float least = d.weight[row * d.columns + j] - d.residual[row * d.columns + j] / curvature;
  return scale * nearest_whole(std::clamp(least / scale, -8.0f, 7.0f)) + 0.0f;  // no -0.0
}

// Makes one pass over rows [first, end).
SPARSEKERN_INLINE void descend(const Descent& d, int64_t first, int64_t end) {
  for (int64_t j = 0; j < d.columns; ++j) {
    const float* curvature = d.hessian + j * d.columns;
    if (!(curvature[j] > 0.0f)) continue;  // a dead feature
    for (int64_t row = first; row < end; ++row) {
      if (d.mask[row * d.columns + j] == 0) continue;
      float& weight = d.weight[row * d.columns + j];
      const float best = best_on_grid(d, row, j, curvature[j]), change = best - weight;
      if (change == 0.0f) continue;
      weight = best;
      float* residual = d.residual + row * d.columns;
      for (int64_t i = 0; i < d.columns; ++i) residual[i] += change * curvature[i];
    }
  }
}

}  // namespace

void quantize_descent_(
    float* weight, float* residual, const float* hessian, const uint8_t* mask, const void* scales, int64_t rows, int64_t columns,
    int64_t passes, const Executor& executor) {
  require_finite("weight", weight, DType::f32, rows, columns, nullptr, executor);
  require_finite("residual", residual, DType::f32, rows, columns, nullptr, executor);
  require_finite("hessian", hessian, DType::f32, columns, columns, nullptr, executor);
  require_finite("scales", scales, DType::f16, rows, nm_q4::blocks(columns), nullptr, executor);
  const Descent descent{weight, residual, hessian, mask, static_cast<const Half*>(scales), columns};
  const auto descend_rows = Entries<&descend>::choose();
  parallel_tasks(executor, (rows + kTogether - 1) / kTogether, [&](int64_t task) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      descend_rows(descent, task * kTogether, std::min(rows, (task + 1) * kTogether));
    }
  });
}

}  // namespace sparsekern::cpu
