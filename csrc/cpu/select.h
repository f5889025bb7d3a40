// Exact selection of the largest of many non-negative floats, without sorting.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"

namespace sparsekern::cpu {

// The elements above `value` are selected, and `ties` of those equal to it.
struct Threshold {
  float value;
  int64_t ties;   // how many of the equal ones are selected
  int64_t equal;  // how many equal ones there are
};

// Scores in panels: panel p holds `columns` columns of 16 rows, `panel_stride` floats after the one before; `rows` rows count.
struct PanelScores {
  const float* data;
  int64_t rows;
  int64_t columns;
  int64_t panel_stride;
};

// The threshold that selects exactly `kept` of the scores, 0 < kept < rows * columns.
Threshold select_threshold(const PanelScores& scores, int64_t kept, const Executor& executor);

}  // namespace sparsekern::cpu
