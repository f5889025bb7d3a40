// q4_scales: the scale of each row and 64 columns with which rounding to 4 bits costs the least.
//
// Floor: 24 scales tried for each weight, with a division, a rounding and two multiply-adds each. The division is the slowest: 5 cycles
// for eight weights, so that two cores try them in 8 ns a weight.
//
// The 64 weights of a group and their costs stay in the first-level cache. Vectors are written out: the loops are so short that the
// compiler unrolls them before it would vectorise.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/finite.h"
#include "cpu/kernels.h"
#include "cpu/panels.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kColumns = nm_q4::kColumns, kLanesOfSum = 16;
constexpr int kSteps = 24;
constexpr float kLeastCode = -8.0f, kMostCode = 7.0f;
constexpr float kLargest = 8.0f * 65504.0f;

struct Search {
  const float* weight;
  const float* importance;
  Half* scales;
  int64_t columns;
};

// Returns the weighted squared error of rounding 64 weights to multiples of a scale. The order of the sums is that of 16 lanes on every
// target.
template <class Target>
SPARSEKERN_INLINE float cost_of(const float* weight, const float* importance, float scale) {
  using Float = typename VectorOf<Target::kWidth>::Float;
  constexpr int64_t kParts = kLanesOfSum / Target::kWidth;
  constexpr float kRounder = 0x1.8p23f;  // as nearest_whole
  const float divisor = scale == 0.0f ? 1.0f : scale;
  const Float least = Float{} + kLeastCode, most = Float{} + kMostCode;
  Float sums[kParts] = {};
  for (int64_t first = 0; first < kColumns; first += kLanesOfSum) {
    for (int64_t part = 0; part < kParts; ++part) {
      const int64_t at = first + part * Target::kWidth;
      const Float value = *reinterpret_cast<const Float*>(weight + at);
      Float code = value / divisor;
      code = code > least ? code : least;
      code = code < most ? code : most;
      const Float error = value - scale * ((code + kRounder) - kRounder);
      sums[part] += *reinterpret_cast<const Float*>(importance + at) * error * error;
    }
  }
  const auto* lanes = reinterpret_cast<const float*>(sums);
  float total[kLanesOfSum];
  std::copy_n(lanes, kLanesOfSum, total);
  for (int64_t width = kLanesOfSum / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) total[i] += total[i + width];
  }
  return total[0];
}

// Returns the best scale of 64 weights, of which `extreme` has the largest magnitude.
template <class Target>
SPARSEKERN_INLINE Half best_scale(const float* weight, const float* importance, float extreme) {
  float least = 0.0f;
  Half best{0};
  if (extreme == 0.0f) return best;
  for (int step = 0; step < kSteps; ++step) {
    const auto share = static_cast<float>(1.0 - step / (2.0 * (kSteps - 1)));
    const Half scale = from_float<Half>(extreme / kLeastCode * share);
    const float cost = cost_of<Target>(weight, importance, to_float(scale));
    if (step == 0 || cost < least) {  // costs may be infinite
      least = cost;
      best = scale;
    }
  }
  return to_float(best) == 0.0f ? Half{0} : best;  // no -0.0
}

// Searches the scales of rows [first, end); returns false if a weight is too large for them.
template <class Target>
SPARSEKERN_INLINE bool search(const Search& s, int64_t first, int64_t end) {
  alignas(64) float weight[kColumns], importance[kColumns];
  for (int64_t begin = 0, block = 0; begin < s.columns; begin += kColumns, ++block) {
    const int64_t given = std::min(kColumns, s.columns - begin);
    std::fill_n(importance, kColumns, 0.0f);
    std::copy_n(s.importance + begin, given, importance);
    for (int64_t row = first; row < end; ++row) {
      std::fill_n(weight, kColumns, 0.0f);
      std::copy_n(s.weight + row * s.columns + begin, given, weight);
      float extreme = 0.0f;
      for (int64_t i = 0; i < kColumns; ++i) extreme = std::fabs(weight[i]) > std::fabs(extreme) ? weight[i] : extreme;
      if (std::fabs(extreme) > kLargest) return false;
      s.scales[row * nm_q4::blocks(s.columns) + block] = best_scale<Target>(weight, importance, extreme);
    }
  }
  return true;
}

}  // namespace

void q4_scales(
    const float* weight, const float* importance, int64_t rows, int64_t columns, void* scales, const Executor& executor) {
  require_finite("weight", weight, DType::f32, rows, columns, nullptr, executor);
  require_finite("importance", importance, DType::f32, 1, columns, nullptr, executor);
  const Search all{weight, importance, static_cast<Half*>(scales), columns};
  const auto search_rows = TargetEntries<&search<Baseline>, &search<Avx2>, &search<Avx512>>::choose();
  std::atomic<bool> fits{true};
  parallel_for(executor, rows, 1 + 4096 / (columns + 1), [&](int64_t first, int64_t end) {
    if (!search_rows(all, first, end)) fits = false;
  });
  if (!fits) {
    throw std::invalid_argument("weight: expected magnitudes up to 524,032, which 4 bits and a float16 scale hold");
  }
}

}  // namespace sparsekern::cpu
