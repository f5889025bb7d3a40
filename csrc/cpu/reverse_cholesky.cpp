// reverse_cholesky: H = V V^T with V upper triangular, from the last block of columns to the first (left-looking).
//
// Floor: features^3 / 6 multiply-adds, nearly all of them in the product of finished columns. V is kept in panels of 16 rows, so
// that it serves as both operands of that product. The rows of H's lower triangle are read in place.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/finite.h"
#include "cpu/kernels.h"
#include "cpu/panels.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kBlock = 96;      // columns per block: six panels, a multiple of the widest tile
constexpr int64_t kSumUnits = 512;  // finished columns multiplied at a time: keeps a tile's operands in L2
constexpr double kSmallestEscalation = 1e-6;
constexpr int kEscalations = 3;

// V under construction: element (row, column) is stored at panel(row / 16)[16 * column + row % 16]. Rows past the last are zero.
struct Factor {
  Buffer<float> data;
  int64_t features;

  int64_t panel_stride() const { return features * kLanes; }
  float* column(int64_t panel, int64_t column) const { return data.get() + panel * panel_stride() + column * kLanes; }
  float& at(int64_t row, int64_t col) const { return column(row / kLanes, col)[row % kLanes]; }
};

struct Block {
  int64_t begin, end;  // columns, and rows of the diagonal block

  int64_t size() const { return end - begin; }
  int64_t first_panel() const { return begin / kLanes; }
  int64_t last_panel() const { return ceil_div(end, kLanes); }
};

constexpr Block block_of(int64_t column, int64_t features) {
  const int64_t begin = column / kBlock * kBlock;
  return {begin, std::min(begin + kBlock, features)};
}

// Loads row j of the lower triangle as column j of V, in every panel down to the end of its diagonal block.
void load_damped(const float* gram, double shift, const Factor& factor, const Executor& executor) {
  const int64_t c = factor.features;
  parallel_for(executor, c, 16, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const float* row = gram + j * c;
      const int64_t full = j / kLanes;
      for (int64_t panel = 0; panel < full; ++panel) std::copy_n(row + panel * kLanes, kLanes, factor.column(panel, j));
      for (int64_t i = full * kLanes; i < block_of(j, c).last_panel() * kLanes; ++i) factor.at(i, j) = i <= j ? row[i] : 0.0f;
      factor.at(j, j) = row[j] == 0.0f ? 1.0f : row[j] + static_cast<float>(shift);
    }
  });
}

// S = H - (finished columns of V) (finished columns of the block's rows)^T, in place in the block's columns of some row panels.
template <class Target>
SPARSEKERN_INLINE void subtract_finished(const Factor& factor, const Block& block, int64_t panel, int64_t panels) {
  for (int64_t k = block.end; k < factor.features; k += kSumUnits) {
    const int64_t units = std::min(kSumUnits, factor.features - k);
    for (int64_t i = 0; i < block.size(); i += kLanes) {
      panel_product<Target, FloatArithmetic<Target>>(
          units, factor.column(block.first_panel() + i / kLanes, k), kLanes, factor.column(panel, k), panels, factor.panel_stride(),
          -1.0f, {factor.column(panel, block.begin + i), kLanes, factor.panel_stride()});
    }
  }
}

// Subtracts from column j of some panels its combination of the block's finished columns to the right. coefficients[i * kBlock + k]
// = V(block.begin + i, block.begin + k).
template <class Target, int kPanels>
SPARSEKERN_INLINE Column<Target, kPanels> pending_column(
    const Factor& factor, const Block& block, const float* coefficients, int64_t panel, int64_t j) {
  using Columns = Column<Target, kPanels>;
  Columns sums[1] = {};
  const int64_t local = j - block.begin;
  add_combination<Target, kPanels, 1>(
      block.end - j - 1, factor.column(panel, j + 1), factor.panel_stride(), coefficients + local * kBlock + local + 1, kBlock,
      sums);
  Columns column = Columns::load(factor.column(panel, j), factor.panel_stride());
#pragma GCC unroll 12
  for (int r = 0; r < Columns::kRegisters; ++r) column.part[r] -= sums[0].part[r];
  return column;
}

// Factors the diagonal block, last column first. Returns false at a pivot that is not positive.
template <class Target>
SPARSEKERN_INLINE bool factor_diagonal_block(const Factor& factor, const Block& block, float* coefficients) {
  for (int64_t j = block.end - 1; j >= block.begin; --j) {
    for (int64_t panel = block.first_panel(); panel <= j / kLanes; ++panel) {
      pending_column<Target, 1>(factor, block, coefficients, panel, j).store(factor.column(panel, j), factor.panel_stride());
    }
    const float pivot = factor.at(j, j);
    if (!(pivot > 0.0f)) return false;
    const float diagonal = std::sqrt(pivot);
    for (int64_t i = block.begin; i < j; ++i) {
      factor.at(i, j) /= diagonal;
      coefficients[(i - block.begin) * kBlock + j - block.begin] = factor.at(i, j);
    }
    factor.at(j, j) = diagonal;
    for (int64_t i = j + 1; i < block.last_panel() * kLanes; ++i) factor.at(i, j) = 0.0f;
  }
  return true;
}

// Computes the block's columns of the panels above the diagonal block.
template <class Target, int kPanels>
SPARSEKERN_INLINE void solve_panels(const Factor& factor, const Block& block, const float* coefficients, int64_t panel) {
  using Columns = Column<Target, kPanels>;
  for (int64_t j = block.end - 1; j >= block.begin; --j) {
    Columns column = pending_column<Target, kPanels>(factor, block, coefficients, panel, j);
    const float diagonal = factor.at(j, j);
#pragma GCC unroll 12
    for (int r = 0; r < Columns::kRegisters; ++r) column.part[r] /= diagonal;
    column.store(factor.column(panel, j), factor.panel_stride());
  }
}

template <class Target>
SPARSEKERN_INLINE void solve_tile(
    const Factor& factor, const Block& block, const float* coefficients, int64_t panel, int64_t panels) {
  int64_t p = 0;
  for (; p + Target::kTilePanels <= panels; p += Target::kTilePanels) {
    solve_panels<Target, Target::kTilePanels>(factor, block, coefficients, panel + p);
  }
  for (; p < panels; ++p) solve_panels<Target, 1>(factor, block, coefficients, panel + p);
}

bool factorise(const Factor& factor, const Executor& executor) {
  constexpr int64_t kTile = Avx512::kTilePanels;
  const auto subtract = TargetEntries<&subtract_finished<Baseline>, &subtract_finished<Avx2>, &subtract_finished<Avx512>>::choose();
  const auto factor_diagonal =
      TargetEntries<&factor_diagonal_block<Baseline>, &factor_diagonal_block<Avx2>, &factor_diagonal_block<Avx512>>::choose();
  const auto solve = TargetEntries<&solve_tile<Baseline>, &solve_tile<Avx2>, &solve_tile<Avx512>>::choose();
  std::vector<float> coefficients(kBlock * kBlock);
  for (int64_t index = ceil_div(factor.features, kBlock) - 1; index >= 0; --index) {
    const Block block = block_of(index * kBlock, factor.features);
    const int64_t panels = block.last_panel();
    if (block.end < factor.features) {
      parallel_tasks(executor, ceil_div(panels, kTile), [&](int64_t tile) {
        subtract(factor, block, tile * kTile, std::min(kTile, panels - tile * kTile));
      });
    }
    if (!factor_diagonal(factor, block, coefficients.data())) return false;
    const int64_t above = block.first_panel();
    parallel_tasks(executor, ceil_div(above, kTile), [&](int64_t tile) {
      solve(factor, block, coefficients.data(), tile * kTile, std::min(kTile, above - tile * kTile));
    });
  }
  return true;
}

void store_factor(const Factor& factor, const float* gram, double shift, float* out, const Executor& executor) {
  const int64_t c = factor.features;
  const auto dead_diagonal = static_cast<float>(-std::sqrt(shift));
  parallel_tasks(executor, ceil_div(c, kLanes), [&](int64_t panel) {
    const int64_t row0 = panel * kLanes;
    const int64_t rows = std::min(kLanes, c - row0);
    for (int64_t lane = 0; lane < rows; ++lane) std::fill_n(out + (row0 + lane) * c, row0, 0.0f);
    for (int64_t j0 = row0; j0 < c; j0 += kLanes) {
      const float* columns = factor.column(panel, j0);
      const int64_t count = std::min(kLanes, c - j0);
      for (int64_t lane = 0; lane < rows; ++lane) {
        for (int64_t j = 0; j < count; ++j) out[(row0 + lane) * c + j0 + j] = columns[j * kLanes + lane];
      }
    }
    for (int64_t i = row0; i < row0 + rows; ++i) {
      if (gram[i * c + i] == 0.0f) out[i * c + i] = dead_diagonal;
    }
  });
}

double mean_diagonal(const float* gram, int64_t features) {
  double sum = 0.0;
  for (int64_t i = 0; i < features; ++i) sum += gram[i * features + i];
  return sum / static_cast<double>(features);
}

// Returns whether each pivot V_jj^2 exceeds the rounding errors of the subtraction that leaves it; dead features have no pivot.
template <class Pivot>
bool all_resolved(const float* gram, int64_t features, double shift, double smallest_share, const Pivot& pivot) {
  for (int64_t j = 0; j < features; ++j) {
    const double entry = gram[j * features + j];
    if (entry != 0.0 && pivot(j) < smallest_share * (entry + shift)) return false;
  }
  return true;
}

bool factorise_float(
    const float* gram, int64_t features, double shift, double smallest_pivot, float* out, const Executor& executor) {
  const Factor factor{allocate<float>(round_up(features, kLanes) * features), features};
  load_damped(gram, shift, factor, executor);
  if (!factorise(factor, executor)) return false;
  const auto pivot = [&](int64_t j) { return double{factor.at(j, j)} * factor.at(j, j); };
  if (!all_resolved(gram, features, shift, smallest_pivot * FLT_EPSILON, pivot)) return false;
  store_factor(factor, gram, shift, out, executor);
  return true;
}

// The last resort, written for clarity: the textbook recurrence in double, rows in parallel.
bool factorise_double(
    const float* gram, int64_t features, double shift, double smallest_pivot, float* out, const Executor& executor) {
  const int64_t c = features;
  std::vector<double> v(static_cast<size_t>(c * c), 0.0);
  for (int64_t j = c - 1; j >= 0; --j) {
    const double* row_j = v.data() + j * c;
    parallel_for(executor, j + 1, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double* row_i = v.data() + i * c;
        double sum = gram[j * c + i];
        if (i == j) sum = sum == 0.0 ? 1.0 : sum + shift;
        for (int64_t k = j + 1; k < c; ++k) sum -= row_i[k] * row_j[k];
        row_i[j] = sum;
      }
    });
    const double pivot = row_j[j];
    if (!(pivot > 0.0)) return false;
    for (int64_t i = 0; i <= j; ++i) v[static_cast<size_t>(i * c + j)] /= std::sqrt(pivot);
  }
  const auto pivot = [&](int64_t j) { return v[static_cast<size_t>(j * c + j)] * v[static_cast<size_t>(j * c + j)]; };
  if (!all_resolved(gram, c, shift, smallest_pivot * DBL_EPSILON, pivot)) return false;
  for (int64_t i = 0; i < c * c; ++i) out[i] = static_cast<float>(v[static_cast<size_t>(i)]);
  for (int64_t i = 0; i < c; ++i) {
    if (gram[i * c + i] == 0.0f) out[i * c + i] = static_cast<float>(-std::sqrt(shift));
  }
  return true;
}

}  // namespace

double reverse_cholesky(
    const float* gram, int64_t features, double damping, float* factor, const Executor& executor, double smallest_pivot) {
  if (features == 0) return damping;
  require_finite_lower("gram", gram, features, executor);
  const double mean = mean_diagonal(gram, features);
  double attempt = damping;
  for (int escalation = 0; escalation <= kEscalations; ++escalation) {
    if (factorise_float(gram, features, attempt * mean, smallest_pivot, factor, executor)) return attempt;
    attempt = 10.0 * (escalation == 0 ? std::max(damping, kSmallestEscalation / 10) : attempt);
  }
  if (factorise_double(gram, features, damping * mean, smallest_pivot, factor, executor)) {
    return damping > 0.0 ? -damping : -std::numeric_limits<double>::infinity();
  }
  char text[64];
  std::snprintf(text, sizeof text, "%g", damping);
  throw std::invalid_argument(
      std::string("gram: not positive semi-definite (damping ") + text + " and up to 1000 times that were tried, then float64)");
}

}  // namespace sparsekern::cpu
