// obs_sweep: prune column by column and compensate each removal in the columns to the right, using one factor V and no inverse.
//
// With D = weight - new_weight, the column errors are E = D V. The current value of column j, when the sweep reaches it, is
//     weight_j + (sum_{i<j} D_i V_ij) / V_jj,
// so that nothing to the right is ever updated. The pending sums of a block of columns are one long product with the D of all
// earlier columns, plus a short recurrence inside the block.
//
// Floor: rows * columns^2 / 2 multiply-adds in that product.
//
// Sixteen rows make a panel; rows go through the recurrence in the lanes of vectors. D is stored in panels, the layout that the
// next product reads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/finite.h"
#include "cpu/kernels.h"
#include "cpu/obs_recurrence.h"
#include "cpu/panels.h"
#include "cpu/select.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kBlock = 128;  // columns of a block if the caller's block size does not change the result
constexpr int64_t kSpan =
    512;  // columns whose sums over all earlier spans are computed together; decides how often D is read from memory
constexpr int64_t kMaxGroup = 64;

int64_t pruned_count(double total, double sparsity) { return static_cast<int64_t>(std::floor(total * sparsity + 1e-9)); }

// The inner loops, for the instruction set of this call.
struct Kernels {
  MultiplyAdd multiply_add = choose_multiply_add();
  decltype(&score_tile<Baseline>) score_tile =
      TargetEntries<&cpu::score_tile<Baseline>, &cpu::score_tile<Avx2>, &cpu::score_tile<Avx512>>::choose();
  decltype(&run_tile<Baseline>) run_tile =
      TargetEntries<&cpu::run_tile<Baseline>, &cpu::run_tile<Avx2>, &cpu::run_tile<Avx512>>::choose();
};

Block load_block(const float* factor, int64_t columns, int64_t begin, int64_t end) {
  const auto size = static_cast<size_t>(end - begin);
  Block block{begin, end, std::vector<float>(size * size), std::vector<float>(size), std::vector<float>(size)};
  for (size_t j = 0; j < size; ++j) {
    const float* column = factor + begin * columns + begin + static_cast<int64_t>(j);
    for (size_t i = 0; i < j; ++i) block.inside[j * size + i] = column[static_cast<int64_t>(i) * columns];
    const float diagonal = column[static_cast<int64_t>(j) * columns];
    const bool dead = std::signbit(diagonal);
    block.diagonal[j] = dead ? 0.0f : diagonal;
    block.reciprocal[j] = dead ? 0.0f : 1.0f / diagonal;
  }
  return block;
}

// Keeps scores above the threshold, and the first `ties` of those equal to it in row-major order.
void apply_threshold(
    const PanelScores& scores, const Threshold& threshold, const Sweep& sweep, int64_t begin, const Executor& executor) {
  std::vector<int64_t> quota(static_cast<size_t>(scores.rows), threshold.ties == 0 ? 0 : scores.columns);
  const bool divided = threshold.ties != 0 && threshold.ties != threshold.equal;
  const auto score_at = [&](int64_t row, int64_t j) {
    return scores.data[row / kLanes * scores.panel_stride + j * kLanes + row % kLanes];
  };
  if (divided) {
    int64_t left = threshold.ties;
    for (int64_t row = 0; row < scores.rows; ++row) {
      int64_t equal = 0;
      for (int64_t j = 0; j < scores.columns; ++j) equal += score_at(row, j) == threshold.value;
      quota[row] = std::min(equal, left);
      left -= quota[row];
    }
  }
  parallel_for(executor, sweep.panels(), 4, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      const float* in = scores.data + panel * scores.panel_stride;
      int8_t* out = sweep.keep_at(panel, begin);
      const bool ties_kept = threshold.ties != 0 && !divided;
      for (int64_t i = 0; i < scores.columns * kLanes; ++i) {
        out[i] = static_cast<int8_t>(-static_cast<int>(ties_kept ? in[i] >= threshold.value : in[i] > threshold.value));
      }
      if (!divided) continue;
      for (int64_t lane = 0; lane < std::min(kLanes, scores.rows - panel * kLanes); ++lane) {
        int64_t left = quota[panel * kLanes + lane];
        for (int64_t j = 0; j < scores.columns && left > 0; ++j) {
          if (in[j * kLanes + lane] != threshold.value) continue;
          out[j * kLanes + lane] = -1;
          --left;
        }
      }
    }
  });
}

void keep_largest(const PanelScores& scores, int64_t kept, const Sweep& sweep, int64_t begin, const Executor& executor) {
  const int64_t total = scores.rows * scores.columns;
  if (kept >= total) {
    apply_threshold(scores, {-1.0f, 0, 0}, sweep, begin, executor);
  } else if (kept == 0) {
    apply_threshold(scores, {std::numeric_limits<float>::infinity(), 0, 0}, sweep, begin, executor);
  } else {
    apply_threshold(scores, select_threshold(scores, kept, executor), sweep, begin, executor);
  }
}

// Selects in each row of a panel separately.
void keep_largest_of_rows(const float* scores, int64_t columns, int64_t kept, int8_t* keep) {
  std::vector<int64_t> order(static_cast<size_t>(columns));
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const auto before = [&](int64_t a, int64_t b) {
      const float x = scores[a * kLanes + lane], y = scores[b * kLanes + lane];
      return x > y || (x == y && a < b);
    };
    std::iota(order.begin(), order.end(), int64_t{0});
    if (kept > 0 && kept < columns) std::nth_element(order.begin(), order.begin() + kept - 1, order.end(), before);
    for (int64_t i = 0; i < columns; ++i) keep[order[i] * kLanes + lane] = static_cast<int8_t>(i < kept ? -1 : 0);
  }
}

template <class T>
struct Matrices {
  const T* weight;
  const uint8_t* mask;  // null: chosen by the pattern; with N:M, the weights that it chooses among
  const float* factor;
  T* new_weight;
  uint8_t* new_mask;  // null: not wanted
};

// Chooses the mask before the sweep, from the initial weights. D is not used yet and holds the scores.
template <class T>
void choose_matrix(const Matrices<T>& matrices, const Sweep& sweep, const Executor& executor) {
  std::vector<float> diagonal(static_cast<size_t>(sweep.columns));
  for (int64_t j = 0; j < sweep.columns; ++j) {
    const float v = matrices.factor[j * sweep.columns + j];
    diagonal[j] = std::signbit(v) ? 0.0f : v;
  }
  parallel_for(executor, sweep.panels(), 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t row0 = panel * kLanes;
      float* scores = sweep.delta_at(panel, 0);
      to_panel(
          matrices.weight + row0 * sweep.columns, std::min(kLanes, sweep.rows - row0), sweep.columns, sweep.columns, scores,
          [](T value) { return std::fabs(to_float(value)); });
      for (int64_t i = 0; i < sweep.panel_stride(); ++i) scores[i] *= diagonal[i / kLanes];
    }
  });
  const int64_t total = sweep.rows * sweep.columns;
  const int64_t kept = total - pruned_count(static_cast<double>(total), sweep.pattern.sparsity);
  keep_largest({sweep.delta.get(), sweep.rows, sweep.columns, sweep.panel_stride()}, kept, sweep, 0, executor);
}

template <class T>
class BlockSweeper {
 public:
  BlockSweeper(const Matrices<T>& matrices, Sweep& sweep, const Executor& executor)
      : matrices_(matrices), sweep_(sweep), executor_(executor) {}

  // Computes the pending sums of the columns of a span over all earlier columns.
  void start_span(int64_t begin, int64_t end) {
    const Multiplier factor = factor_above(0, begin, end);
    for_each_tile([&](int64_t panel, int64_t panels) {
      for (int64_t p = panel; p < panel + panels; ++p) std::fill_n(sweep_.delta_at(p, begin), (end - begin) * kLanes, 0.0f);
      add_product(factor, 0, begin, panel, panels);
    });
  }

  void run_block(const Block& block, int64_t span_begin) {
    const Multiplier factor = factor_above(span_begin, block.begin, block.end);
    const Scope scope = sweep_.pattern.scope;
    const bool choose_all_rows = scope == Scope::block && sweep_.pattern.n == 0 && matrices_.mask == nullptr;
    const bool choose_rows = scope == Scope::row && sweep_.pattern.n == 0 && matrices_.mask == nullptr;
    for_each_tile(block, [&](const Tile& tile) {
      add_product(factor, span_begin, block.begin, tile.panel, tile.panels);
      load_weight(block, tile);
      if (choose_all_rows || choose_rows) kernels_.score_tile(sweep_, block, tile);
      if (choose_all_rows) return;
      if (choose_rows) choose_each_row(block, tile);
      finish(block, tile);
    });
    if (!choose_all_rows) return;
    const PanelScores scores{sweep_.scores.get(), sweep_.rows, block.size(), block.size() * kLanes};
    keep_largest(scores, kept_of(block, sweep_.rows), sweep_, block.begin, executor_);
    for_each_tile(block, [&](const Tile& tile) {
      load_weight(block, tile);
      finish(block, tile);
    });
  }

 private:
  // Returns the part of V that multiplies the columns [row, begin) to give the columns [begin, end).
  Multiplier factor_above(int64_t row, int64_t begin, int64_t end) const {
    return load_multiplier(matrices_.factor + row * sweep_.columns + begin, sweep_.columns, begin - row, end - begin, executor_);
  }

  // Adds D times a rectangle of V that begins at row `row` to the pending sums from column `begin` on.
  void add_product(const Multiplier& factor, int64_t row, int64_t begin, int64_t panel, int64_t panels) const {
    const int64_t stride = sweep_.panel_stride();
    kernels_.multiply_add(
        factor, factor.units, factor.outputs, 1.0f, sweep_.delta_at(panel, row), stride, sweep_.delta_at(panel, begin), stride,
        panels);
  }

  template <class F>
  void for_each_tile(const F& f) {
    cpu::for_each_tile(sweep_.panels(), executor_, f);
  }

  template <class F>
  void for_each_tile(const Block& block, const F& f) {
    const int64_t floats = kTilePanels * block.size() * kLanes;
    for_each_tile([&](int64_t panel, int64_t panels) {
      const auto buffer = allocate<float>(2 * floats);
      f(Tile{panel, panels, buffer.get(), buffer.get() + floats});
    });
  }

  int64_t rows_of(int64_t panel) const { return std::min(kLanes, sweep_.rows - panel * kLanes); }

  // Counting the pruned weights up to each border of a block makes the total exact whatever the block size.
  int64_t kept_of(const Block& block, int64_t rows) const {
    const double sparsity = sweep_.pattern.sparsity;
    const int64_t pruned = pruned_count(static_cast<double>(rows * block.end), sparsity) -
                           pruned_count(static_cast<double>(rows * block.begin), sparsity);
    return rows * block.size() - pruned;
  }

  void load_weight(const Block& block, const Tile& tile) {
    for (int64_t p = 0; p < tile.panels; ++p) {
      const int64_t row0 = (tile.panel + p) * kLanes;
      to_panel(
          matrices_.weight + row0 * sweep_.columns + block.begin, rows_of(tile.panel + p), sweep_.columns, block.size(),
          tile.weight + p * tile.weight_stride(block), [](T value) { return to_float(value); });
      if (matrices_.mask == nullptr) continue;
      to_panel(
          matrices_.mask + row0 * sweep_.columns + block.begin, rows_of(tile.panel + p), sweep_.columns, block.size(),
          sweep_.keep_at(tile.panel + p, block.begin), [](uint8_t kept) { return static_cast<int8_t>(kept != 0 ? -1 : 0); });
    }
  }

  void choose_each_row(const Block& block, const Tile& tile) {
    for (int64_t p = 0; p < tile.panels; ++p) {
      keep_largest_of_rows(
          sweep_.scores.get() + (tile.panel + p) * block.size() * kLanes, block.size(), kept_of(block, 1),
          sweep_.keep_at(tile.panel + p, block.begin));
    }
  }

  void finish(const Block& block, const Tile& tile) {
    float error[kTilePanels * kLanes];
    kernels_.run_tile(sweep_, block, tile, error);
    for (int64_t p = 0; p < tile.panels; ++p) {
      const int64_t row0 = (tile.panel + p) * kLanes;
      const int64_t rows = rows_of(tile.panel + p);
      const int64_t offset = row0 * sweep_.columns + block.begin;
      for (int64_t lane = 0; lane < rows; ++lane) sweep_.row_error[row0 + lane] += error[p * kLanes + lane];
      from_panel(
          tile.weight + p * tile.weight_stride(block), rows, block.size(), matrices_.new_weight + offset, sweep_.columns,
          [](float value) { return from_float<T>(value); });
      if (matrices_.new_mask == nullptr) continue;
      from_panel(
          sweep_.keep_at(tile.panel + p, block.begin), rows, block.size(), matrices_.new_mask + offset, sweep_.columns,
          [](int8_t kept) { return static_cast<uint8_t>(kept != 0); });
    }
  }

  const Matrices<T>& matrices_;
  Sweep& sweep_;
  const Executor& executor_;
  const Kernels kernels_;
};

// The caller's block size applies only if the block decides which weights compete; N:M groups must not straddle blocks.
int64_t block_columns(const SweepPattern& pattern, bool fixed_mask) {
  if (fixed_mask || (pattern.n == 0 && pattern.scope == Scope::matrix)) return kBlock;
  if (pattern.n > 0) return std::max<int64_t>(1, kBlock / pattern.m) * pattern.m;
  return pattern.block_size;
}

template <class T>
void sweep_columns(
    const Matrices<T>& matrices, const SweepPattern& pattern, int64_t rows, int64_t columns, float* row_error,
    const Executor& executor, const float* scales = nullptr) {
  const int64_t panels = ceil_div(rows, kLanes);
  const int64_t step = std::min(block_columns(pattern, matrices.mask != nullptr && pattern.n == 0), columns);
  Sweep sweep{
      pattern,
      rows,
      columns,
      matrices.mask != nullptr && pattern.n > 0,
      allocate<float>(panels * columns * kLanes),
      allocate<int8_t>(panels * columns * kLanes),
      allocate<float>(panels * step * kLanes),
      std::vector<double>(static_cast<size_t>(rows), 0.0),
      scales};
  if (matrices.mask == nullptr && pattern.n == 0 && pattern.scope == Scope::matrix) choose_matrix(matrices, sweep, executor);
  BlockSweeper<T> sweeper(matrices, sweep, executor);
  const int64_t span = std::max<int64_t>(1, kSpan / step) * step;
  for (int64_t span_begin = 0; span_begin < columns; span_begin += span) {
    const int64_t span_end = std::min(span_begin + span, columns);
    sweeper.start_span(span_begin, span_end);
    for (int64_t begin = span_begin; begin < span_end; begin += step) {
      sweeper.run_block(load_block(matrices.factor, columns, begin, std::min(begin + step, span_end)), span_begin);
    }
  }
  std::copy(sweep.row_error.begin(), sweep.row_error.end(), row_error);
}

}  // namespace

void require_whole_groups(const SweepPattern& pattern, int64_t columns) {
  if (pattern.n > 0 && (pattern.m > kMaxGroup || columns % pattern.m != 0)) {
    throw std::invalid_argument("m: expected at most 64 and a divisor of the input features");
  }
}

void obs_sweep(
    const void* weight, DType dtype, const float* factor, const uint8_t* mask, const SweepPattern& pattern, int64_t rows,
    int64_t columns, void* new_weight, uint8_t* new_mask, float* row_error, const Executor& executor) {
  require_whole_groups(pattern, columns);
  std::fill_n(row_error, rows, 0.0f);
  if (rows == 0 || columns == 0) return;
  require_finite("weight", weight, dtype, rows, columns, nullptr, executor);
  require_finite("factor", factor, DType::f32, columns, columns, nullptr, executor);
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Matrices<T> matrices{static_cast<const T*>(weight), mask, factor, static_cast<T*>(new_weight), new_mask};
    sweep_columns(matrices, pattern, rows, columns, row_error, executor);
  });
}

void obs_quantize(
    const float* weight, const float* factor, const uint8_t* mask, const void* scales, int64_t rows, int64_t columns,
    float* new_weight, float* row_error, const Executor& executor) {
  std::fill_n(row_error, rows, 0.0f);
  if (rows == 0 || columns == 0) return;
  const int64_t blocks = nm_q4::blocks(columns), panel = blocks * kLanes;
  require_finite("weight", weight, DType::f32, rows, columns, nullptr, executor);
  require_finite("factor", factor, DType::f32, columns, columns, nullptr, executor);
  require_finite("scales", scales, DType::f16, rows, blocks, nullptr, executor);
  const auto in_panels = allocate<float>(ceil_div(rows, kLanes) * panel);
  for (int64_t row = 0; row < rows; row += kLanes) {
    to_panel(
        static_cast<const Half*>(scales) + row * blocks, std::min(kLanes, rows - row), blocks, blocks,
        in_panels.get() + row / kLanes * panel, [](Half scale) { return to_float(scale); });
  }
  const Matrices<float> matrices{weight, mask, factor, new_weight, nullptr};
  sweep_columns(matrices, {0, 0, 0.0, Scope::row, kBlock}, rows, columns, row_error, executor, in_panels.get());
}

}  // namespace sparsekern::cpu
