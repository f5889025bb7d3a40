// Whole matrices in panels, and the product of some of their columns with a rectangle of another matrix. `obs_sweep`, `gram_solve`
// and `masked_lstsq` spend most of their time in that product.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/dispatch.h"
#include "cpu/panels.h"
#include "cpu/parallel.h"

namespace sparsekern::cpu {

constexpr int64_t kProductUnits = 512;  // units multiplied at a time: keeps a tile's operands in L2
constexpr int64_t kTilePanels = 3;      // row panels multiplied together

// Copies rows of a row-major matrix to a panel and back; rows past the last are zero in the panel.
template <class T, class Out, class Convert>
void to_panel(const T* matrix, int64_t rows, int64_t stride, int64_t columns, Out* panel, const Convert& convert) {
  for (int64_t j0 = 0; j0 < columns; j0 += kLanes) {
    const int64_t count = std::min(kLanes, columns - j0);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t j = 0; j < count; ++j) {
        panel[(j0 + j) * kLanes + lane] = lane < rows ? convert(matrix[lane * stride + j0 + j]) : Out{};
      }
    }
  }
}

template <class T, class In, class Convert>
void from_panel(const In* panel, int64_t rows, int64_t columns, T* matrix, int64_t stride, const Convert& convert) {
  for (int64_t lane = 0; lane < rows; ++lane) {
    for (int64_t j = 0; j < columns; ++j) matrix[lane * stride + j] = convert(panel[j * kLanes + lane]);
  }
}

// A matrix in consecutive panels of rows: element (row, column) is stored at at(row / 16, column)[row % 16].
struct PanelMatrix {
  int64_t rows, columns;
  Buffer<float> data;

  PanelMatrix(int64_t rows_, int64_t columns_)
      : rows(rows_), columns(columns_), data(allocate<float>(ceil_div(rows_, kLanes) * columns_ * kLanes)) {}

  int64_t panels() const { return ceil_div(rows, kLanes); }
  int64_t rows_of(int64_t panel) const { return std::min(kLanes, rows - panel * kLanes); }
  int64_t stride() const { return columns * kLanes; }  // floats between panels
  float* at(int64_t panel, int64_t column) const { return data.get() + panel * stride() + column * kLanes; }

  // Copy from and to a row-major matrix of the same size.
  void load(const float* matrix, const Executor& executor);
  void store(float* matrix, const Executor& executor) const;
};

// The right-hand operand of columns in panels: `units` rows and `outputs` columns, as panels of 16 outputs.
struct Multiplier {
  int64_t units = 0, outputs = 0;
  Buffer<float> data;

  Multiplier(int64_t units_, int64_t outputs_)
      : units(units_), outputs(outputs_), data(allocate<float>(round_up(outputs_, kLanes) * units_)) {}

  float* panel(int64_t output) const { return data.get() + output * units; }  // output: a multiple of 16
};

// Loads the multiplier (k, j) = corner[k * stride + j], or corner[j * stride + k].
Multiplier load_multiplier(const float* corner, int64_t stride, int64_t units, int64_t outputs, const Executor& executor);
Multiplier load_multiplier_transposed(
    const float* corner, int64_t stride, int64_t units, int64_t outputs, const Executor& executor);

// out[:, j] += alpha * sum_k in[:, k] multiplier(k, j) for the first `units` k and `outputs` j of the multiplier, and for `panels`
// panels of rows that are `stride` floats apart.
template <class Target>
SPARSEKERN_INLINE void multiply_add(
    const Multiplier& multiplier, int64_t units, int64_t outputs, float alpha, const float* in, int64_t in_stride, float* out,
    int64_t out_stride, int64_t panels) {
  alignas(64) float spill[kTilePanels * kLanes * kLanes];
  for (int64_t k = 0; k < units; k += kProductUnits) {
    const int64_t count = std::min(kProductUnits, units - k);
    for (int64_t j = 0; j < outputs; j += kLanes) {
      const float* broadcast = multiplier.panel(j) + k * kLanes;
      const int64_t lanes = std::min(kLanes, outputs - j);
      if (lanes == kLanes) {
        panel_product<Target, FloatArithmetic<Target>>(
            count, broadcast, kLanes, in + k * kLanes, panels, in_stride, alpha, {out + j * kLanes, kLanes, out_stride});
        continue;
      }
      std::fill_n(spill, panels * kLanes * kLanes, 0.0f);
      panel_product<Target, FloatArithmetic<Target>>(
          count, broadcast, kLanes, in + k * kLanes, panels, in_stride, alpha, {spill, kLanes, kLanes * kLanes});
      for (int64_t p = 0; p < panels; ++p) {
        for (int64_t i = 0; i < lanes * kLanes; ++i) out[p * out_stride + j * kLanes + i] += spill[p * kLanes * kLanes + i];
      }
    }
  }
}

using MultiplyAdd = decltype(&multiply_add<Baseline>);

inline MultiplyAdd choose_multiply_add() {
  return TargetEntries<&multiply_add<Baseline>, &multiply_add<Avx2>, &multiply_add<Avx512>>::choose();
}

// Calls f(panel, panels) for each tile of neighbouring panels, last to first: if tiles differ in cost, the last are the costly
// ones.
template <class F>
void for_each_tile(int64_t panels, const Executor& executor, const F& f) {
  const int64_t tiles = ceil_div(panels, kTilePanels);
  parallel_tasks(executor, tiles, [&](int64_t task) {
    const int64_t panel = (tiles - 1 - task) * kTilePanels;
    f(panel, std::min(kTilePanels, panels - panel));
  });
}

}  // namespace sparsekern::cpu
