#include "cpu/panel_matrix.h"

namespace sparsekern::cpu {

namespace {

constexpr auto kSame = [](float value) { return value; };

}  // namespace

void PanelMatrix::load(const float* matrix, const Executor& executor) {
  parallel_for(executor, panels(), 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) to_panel(matrix + p * kLanes * columns, rows_of(p), columns, columns, at(p, 0), kSame);
  });
}

void PanelMatrix::store(float* matrix, const Executor& executor) const {
  parallel_for(executor, panels(), 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) from_panel(at(p, 0), rows_of(p), columns, matrix + p * kLanes * columns, columns, kSame);
  });
}

Multiplier load_multiplier(const float* corner, int64_t stride, int64_t units, int64_t outputs, const Executor& executor) {
  Multiplier multiplier(units, outputs);
  parallel_for(executor, units, 64, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      for (int64_t j = 0; j < outputs; j += kLanes) {
        float* out = multiplier.panel(j) + k * kLanes;
        const int64_t lanes = std::min(kLanes, outputs - j);
        std::copy_n(corner + k * stride + j, lanes, out);
        std::fill(out + lanes, out + kLanes, 0.0f);
      }
    }
  });
  return multiplier;
}

Multiplier load_multiplier_transposed(
    const float* corner, int64_t stride, int64_t units, int64_t outputs, const Executor& executor) {
  Multiplier multiplier(units, outputs);
  parallel_for(executor, ceil_div(outputs, kLanes), 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t j = panel * kLanes;
      to_panel(corner + j * stride, std::min(kLanes, outputs - j), stride, units, multiplier.panel(j), kSame);
    }
  });
  return multiplier;
}

}  // namespace sparsekern::cpu
