// masked_lstsq: the weights on a fixed mask with the smallest output error, for all rows.
//
// Floor: columns^2 multiply-adds per row and iteration, in the product of the search directions with the Gram matrix. A row with a
// small support takes support^3 / 6 once instead. A tile of rows runs all its iterations alone, in panels: nothing waits for other
// rows, and a tile stops when its rows are done. The basis is the one in which the Gram matrix has a unit diagonal, which is Jacobi
// preconditioning at no cost.
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <numeric>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/finite.h"
#include "cpu/kernels.h"
#include "cpu/lane_cholesky.h"
#include "cpu/panel_matrix.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kTileRows = kTilePanels * kLanes;
// Measured: up to here a factorisation takes no longer than eight iterations. Larger ones do not fit the caches.
constexpr int64_t kLargestExact = 256, kExactShare = 12;
constexpr float kExactFit = 1e-6f;  // share of the initial error that is rounding

// The damped Gram matrix with a unit diagonal, and the factors that take weights to its basis and back. Both are zero for dead
// features.
struct UnitGram {
  int64_t columns;
  Buffer<float> matrix;
  std::vector<float> to, from;
};

UnitGram unit_gram(const float* gram, int64_t columns, double damping, const Executor& executor) {
  double mean = 0.0;
  for (int64_t j = 0; j < columns; ++j) mean += gram[j * columns + j];
  const double shift = columns == 0 ? 0.0 : damping * mean / static_cast<double>(columns);
  UnitGram unit{columns, allocate<float>(columns * columns), std::vector<float>(columns), std::vector<float>(columns)};
  for (int64_t j = 0; j < columns; ++j) {
    const double entry = gram[j * columns + j];
    unit.to[j] = entry > 0.0 ? static_cast<float>(std::sqrt(entry + shift)) : 0.0f;
    unit.from[j] = entry > 0.0 ? static_cast<float>(1.0 / std::sqrt(entry + shift)) : 0.0f;
  }
  parallel_for(executor, columns, 16, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      float* out = unit.matrix.get() + i * columns;
      for (int64_t j = 0; j < i; ++j) out[j] = gram[i * columns + j] * unit.from[i] * unit.from[j];
      out[i] = unit.from[i] > 0.0f ? 1.0f : 0.0f;
    }
  });
  gram_symmetrize_(unit.matrix.get(), columns, executor);
  return unit;
}

template <class T>
struct Problem {
  const T* weight;
  const T* start;  // null: weight
  const uint8_t* mask;
  T* new_weight;
  float* row_error;
  int64_t rows, columns;
  const UnitGram& unit;
  const Multiplier& gram;             // unit.matrix
  const std::vector<int64_t>& order;  // rows sorted by the size of their support, so that neighbours have similar sizes
  const LeastSquares& settings;
};

// Up to 48 rows in panels, and the state of their iterations.
struct Tile {
  int64_t panels;
  PanelMatrix solution, residual, direction, product;
  Buffer<int8_t> keep;  // -1 where kept
  float error[kTileRows], floor[kTileRows], gamma[kTileRows], last[kTileRows];
  bool active[kTileRows];

  explicit Tile(int64_t columns)
      : panels(0),
        solution(kTileRows, columns),
        residual(kTileRows, columns),
        direction(kTileRows, columns),
        product(kTileRows, columns),
        keep(allocate<int8_t>(kTileRows * columns)) {}

  int8_t* keep_at(int64_t panel) const { return keep.get() + panel * solution.stride(); }
};

template <class Target>
struct Lanes {
  using Float = typename VectorOf<Target::kWidth>::Float;
  using Int = typename VectorOf<Target::kWidth>::Int;
  using Byte = typename VectorOf<Target::kWidth>::Byte;
  static constexpr int kParts = kLanes / Target::kWidth;
  static constexpr int64_t kRun = 64;  // columns summed separately, to keep the rounding error of long sums small

  static SPARSEKERN_INLINE Float load(const float* p) { return *reinterpret_cast<const Float*>(p); }
  static SPARSEKERN_INLINE void store(float* p, Float value) { *reinterpret_cast<Float*>(p) = value; }
  static SPARSEKERN_INLINE Float masked(Float value, const int8_t* keep) {
    const Int bits = reinterpret_cast<const Int&>(value) & __builtin_convertvector(*reinterpret_cast<const Byte*>(keep), Int);
    return reinterpret_cast<const Float&>(bits);
  }

  // sums[lane] = sum over the columns of term(index), for each part of a panel; term may also write.
  template <class Term>
  static SPARSEKERN_INLINE void sum_columns(int64_t columns, float* sums, const Term& term) {
    for (int part = 0; part < kParts; ++part) {
      Float total = {};
      for (int64_t begin = 0; begin < columns; begin += kRun) {
        Float sum = {};
        for (int64_t j = begin; j < std::min(begin + kRun, columns); ++j) sum += term(j * kLanes + part * Target::kWidth, part);
        total += sum;
      }
      store(sums + part * Target::kWidth, total);
    }
  }
};

template <class Target>
SPARSEKERN_INLINE void multiply_by_gram(const Multiplier& gram, const PanelMatrix& in, const PanelMatrix& out, int64_t panels) {
  for (int64_t p = 0; p < panels; ++p) std::fill_n(out.at(p, 0), out.stride(), 0.0f);
  multiply_add<Target>(gram, gram.units, gram.outputs, 1.0f, in.at(0, 0), in.stride(), out.at(0, 0), out.stride(), panels);
}

// Loads columns [begin, end) of one row into a lane of its panel. Rows past the last are zero.
template <class T>
void load_lane(const Problem<T>& problem, int64_t row, int64_t begin, int64_t end, int64_t panel, int64_t lane, const Tile& tile) {
  const T* weight = problem.weight + row * problem.columns;
  const T* start = (problem.start == nullptr ? problem.weight : problem.start) + row * problem.columns;
  const uint8_t* mask = problem.mask + row * problem.columns;
  float* solution = tile.solution.at(panel, 0) + lane;
  float* delta = tile.direction.at(panel, 0) + lane;
  int8_t* keep = tile.keep_at(panel) + lane;
  for (int64_t j = begin; j < end; ++j) {
    const float to = problem.unit.to[j];
    const bool kept = mask[j] != 0 && to > 0.0f;
    const float value = kept ? to_float(start[j]) * to : 0.0f;
    solution[j * kLanes] = value;
    delta[j * kLanes] = to_float(weight[j]) * to - value;
    keep[j * kLanes] = static_cast<int8_t>(kept ? -1 : 0);
  }
}

// Loads the rows into panels in the unit-diagonal basis; `direction` then holds weight - solution.
template <class T>
void load_tile(const Problem<T>& problem, int64_t first_row, Tile& tile) {
  const int64_t rows = std::min(kTileRows, problem.rows - first_row);
  tile.panels = ceil_div(rows, kLanes);
  if (rows % kLanes != 0) {
    std::fill_n(tile.solution.at(tile.panels - 1, 0), tile.solution.stride(), 0.0f);
    std::fill_n(tile.direction.at(tile.panels - 1, 0), tile.direction.stride(), 0.0f);
    std::fill_n(tile.keep_at(tile.panels - 1), tile.solution.stride(), int8_t{0});
  }
  for (int64_t begin = 0; begin < problem.columns; begin += kLanes) {  // the data shared by a column stays in cache for all rows
    for (int64_t i = 0; i < rows; ++i) {
      load_lane(
          problem, problem.order[first_row + i], begin, std::min(begin + kLanes, problem.columns), i / kLanes, i % kLanes, tile);
    }
  }
}

template <class T>
void store_tile(const Problem<T>& problem, int64_t first_row, const Tile& tile) {
  const int64_t rows = std::min(kTileRows, problem.rows - first_row);
  for (int64_t begin = 0; begin < problem.columns; begin += kLanes) {
    for (int64_t i = 0; i < rows; ++i) {
      const float* solution = tile.solution.at(i / kLanes, 0) + i % kLanes;
      T* out = problem.new_weight + problem.order[first_row + i] * problem.columns;
      for (int64_t j = begin; j < std::min(begin + kLanes, problem.columns); ++j) {
        out[j] = from_float<T>(solution[j * kLanes] * problem.unit.from[j]);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) problem.row_error[problem.order[first_row + i]] = std::max(tile.error[i], 0.0f);
}

// residual = the kept part of (weight - solution) gram. Also computes the initial errors of the rows.
template <class Target>
SPARSEKERN_INLINE void start_tile(const Multiplier& gram, Tile& tile) {
  using L = Lanes<Target>;
  multiply_by_gram<Target>(gram, tile.direction, tile.residual, tile.panels);
  for (int64_t p = 0; p < tile.panels; ++p) {
    const float* delta = tile.direction.at(p, 0);
    float* residual = tile.residual.at(p, 0);
    const int8_t* keep = tile.keep_at(p);
    L::sum_columns(gram.outputs, tile.error + p * kLanes, [&](int64_t i, int) SPARSEKERN_INLINE_LAMBDA {
      const auto full = L::load(residual + i);
      L::store(residual + i, L::masked(full, keep + i));
      return L::load(delta + i) * full;
    });
    float* direction = tile.direction.at(p, 0);
    L::sum_columns(gram.outputs, tile.gamma + p * kLanes, [&](int64_t i, int) SPARSEKERN_INLINE_LAMBDA {
      const auto value = L::load(residual + i);
      L::store(direction + i, value);
      return value * value;
    });
  }
  for (int64_t i = 0; i < tile.panels * kLanes; ++i) {
    tile.floor[i] = kExactFit * tile.error[i];
    tile.last[i] = FLT_MAX;
    tile.active[i] = tile.gamma[i] > 0.0f;
  }
}

// Solves the rows of a panel at once, each by factoring its part of the Gram matrix; rows whose factorisation fails stay active.
template <class Target>
SPARSEKERN_INLINE void solve_panel(const UnitGram& unit, Tile& tile, int64_t panel, LaneCholesky<Target>& cholesky) {
  const int8_t* keep = tile.keep_at(panel);
  std::vector<int32_t> support[kLanes];
  for (int64_t j = 0; j < unit.columns; ++j) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (keep[j * kLanes + lane] != 0) support[lane].push_back(static_cast<int32_t>(j));
    }
  }
  cholesky.gather(unit.matrix.get(), unit.columns, support);
  const auto step = allocate<float>(cholesky.size() * kLanes);
  std::fill_n(step.get(), cholesky.size() * kLanes, 0.0f);
  float* residual = tile.residual.at(panel, 0);
  float* solution = tile.solution.at(panel, 0);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    for (size_t a = 0; a < support[lane].size(); ++a) step[a * kLanes + lane] = residual[support[lane][a] * kLanes + lane];
  }
  const uint32_t failed = cholesky.solve(step.get());
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    if (failed >> lane & 1) continue;
    float decrease = 0.0f;
    for (size_t a = 0; a < support[lane].size(); ++a) {
      const int64_t i = support[lane][a] * kLanes + lane;
      solution[i] += step[a * kLanes + lane];
      decrease += step[a * kLanes + lane] * residual[i];
    }
    tile.error[panel * kLanes + lane] -= decrease;
    tile.active[panel * kLanes + lane] = false;
  }
}

// Runs one iteration of conjugate gradients for the active rows; the others are unchanged.
template <class Target>
SPARSEKERN_INLINE void iterate(const Multiplier& gram, float tolerance, Tile& tile) {
  using L = Lanes<Target>;
  multiply_by_gram<Target>(gram, tile.direction, tile.product, tile.panels);
  for (int64_t p = 0; p < tile.panels; ++p) {
    float* solution = tile.solution.at(p, 0);
    float* residual = tile.residual.at(p, 0);
    float* direction = tile.direction.at(p, 0);
    const float* product = tile.product.at(p, 0);
    const int8_t* keep = tile.keep_at(p);
    const int64_t row = p * kLanes;
    alignas(64) float curvature[kLanes], alpha[kLanes], beta[kLanes], gamma[kLanes];
    L::sum_columns(gram.outputs, curvature, [&](int64_t i, int) SPARSEKERN_INLINE_LAMBDA {
      return L::load(direction + i) * L::load(product + i);
    });
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      alpha[lane] = tile.active[row + lane] && curvature[lane] > 0.0f ? tile.gamma[row + lane] / curvature[lane] : 0.0f;
    }
    L::sum_columns(gram.outputs, gamma, [&](int64_t i, int part) SPARSEKERN_INLINE_LAMBDA {
      const auto step = L::load(alpha + part * Target::kWidth);
      L::store(solution + i, L::load(solution + i) + step * L::load(direction + i));
      const auto left = L::load(residual + i) - step * L::masked(L::load(product + i), keep + i);
      L::store(residual + i, left);
      return left * left;
    });
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t i = row + lane;
      if (!tile.active[i]) {
        beta[lane] = 0.0f;
        continue;
      }
      const float decrease = alpha[lane] * tile.gamma[i];
      tile.error[i] -= decrease;
      tile.active[i] = gamma[lane] > 0.0f && decrease + tile.last[i] > tolerance * std::max(tile.error[i], tile.floor[i]);
      tile.last[i] = decrease;
      beta[lane] = gamma[lane] / tile.gamma[i];
      tile.gamma[i] = gamma[lane];
    }
    alignas(64) float ignored[kLanes];
    L::sum_columns(gram.outputs, ignored, [&](int64_t i, int part) SPARSEKERN_INLINE_LAMBDA {
      const auto next = L::load(residual + i) + L::load(beta + part * Target::kWidth) * L::load(direction + i);
      L::store(direction + i, next);
      return next;
    });
  }
}

template <class Target>
SPARSEKERN_INLINE int64_t run_tile(const UnitGram& unit, const Multiplier& gram, const LeastSquares& settings, Tile& tile) {
  start_tile<Target>(gram, tile);
  for (int64_t p = 0; p < tile.panels; ++p) {
    int64_t count[kLanes] = {};
    for (int64_t i = 0; i < tile.solution.stride(); ++i) count[i % kLanes] -= tile.keep_at(p)[i];
    const int64_t largest = *std::max_element(count, count + kLanes);
    if (!settings.exact(largest, unit.columns)) continue;
    LaneCholesky<Target> cholesky(largest);
    solve_panel<Target>(unit, tile, p, cholesky);
  }
  const auto any_active = [&] {
    return std::any_of(tile.active, tile.active + tile.panels * kLanes, [](bool active) { return active; });
  };
  for (int64_t i = 0; i < settings.max_iterations && any_active(); ++i)
    iterate<Target>(gram, static_cast<float>(settings.tolerance), tile);
  return std::count(tile.active, tile.active + tile.panels * kLanes, true);
}

std::vector<int64_t> rows_by_support(const uint8_t* mask, int64_t rows, int64_t columns, const Executor& executor) {
  std::vector<int64_t> count(static_cast<size_t>(rows)), order(static_cast<size_t>(rows));
  parallel_for(executor, rows, 1 + 65536 / (columns + 1), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      count[row] = std::count(mask + row * columns, mask + (row + 1) * columns, uint8_t{1});
  });
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return count[a] < count[b]; });
  return order;
}

}  // namespace

bool LeastSquares::exact(int64_t support, int64_t columns) const {
  if (solver != Solver::automatic) return solver == Solver::cholesky;
  return support <= kLargestExact && support * support * support <= kExactShare * columns * columns;
}

int64_t masked_lstsq(
    const void* weight, const void* start, DType dtype, const float* gram, const uint8_t* mask, const LeastSquares& settings,
    int64_t rows, int64_t columns, void* new_weight, float* row_error, const Executor& executor) {
  require_finite("weight", weight, dtype, rows, columns, nullptr, executor);
  require_finite_lower("gram", gram, columns, executor);
  if (start != nullptr) require_finite("start", start, dtype, rows, columns, nullptr, executor);
  const UnitGram unit = unit_gram(gram, columns, settings.damping, executor);
  const Multiplier multiplier = load_multiplier(unit.matrix.get(), columns, columns, columns, executor);
  const std::vector<int64_t> order = rows_by_support(mask, rows, columns, executor);
  const auto run = TargetEntries<&run_tile<Baseline>, &run_tile<Avx2>, &run_tile<Avx512>>::choose();
  std::atomic<int64_t> unfinished{0};
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Problem<T> problem{
        static_cast<const T*>(weight),
        static_cast<const T*>(start),
        mask,
        static_cast<T*>(new_weight),
        row_error,
        rows,
        columns,
        unit,
        multiplier,
        order,
        settings};
    const auto make_tile = [&] { return Tile(columns); };
    parallel_tasks(executor, ceil_div(rows, kTileRows), make_tile, [&](int64_t index, Tile& tile) {
      load_tile(problem, index * kTileRows, tile);
      unfinished += run(unit, multiplier, settings, tile);
      store_tile(problem, index * kTileRows, tile);
    });
  });
  return unfinished;
}

}  // namespace sparsekern::cpu
