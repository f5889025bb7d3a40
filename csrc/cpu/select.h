// Exact selection of the largest of many non-negative floats, without sorting.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"

namespace sparsekern::cpu {

// The elements above `value` are selected, and `ties` of those equal to it.
struct Threshold {
  float value;
  int64_t ties;   // number of equal elements that are selected
  int64_t equal;  // number of equal elements
};

// Scores in panels: panel p holds `columns` columns of 16 rows and begins `panel_stride` floats after the previous one. `rows` rows
// are used.
struct PanelScores {
  const float* data;
  int64_t rows;
  int64_t columns;
  int64_t panel_stride;
};

// Returns the threshold that selects exactly `kept` of the scores, 0 < kept < rows * columns.
Threshold select_threshold(const PanelScores& scores, int64_t kept, const Executor& executor);

}  // namespace sparsekern::cpu
