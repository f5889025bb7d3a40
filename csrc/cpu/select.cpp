#include "cpu/select.h"

#include <algorithm>
#include <array>
#include <mutex>
#include <vector>

#include "common/dtype.h"
#include "cpu/panels.h"

namespace sparsekern::cpu {

namespace {

// The bits of a non-negative float order like the float, so that the value is found digit by digit from the top: 11 + 11 + 10 bits.
struct Digit {
  int shift, bits;
};
constexpr std::array<Digit, 3> kDigits{{{21, 11}, {10, 11}, {0, 10}}};
constexpr int64_t kBuckets = int64_t{1} << 11;

using Histogram = std::vector<int64_t>;

// Counts the values of this digit among the scores whose higher digits equal those of `prefix`. Two tables are used in turn,
// because neighbouring scores often share a bucket, and an increment must wait for the previous one.
void count_panel(const float* scores, int64_t columns, int64_t rows, Digit digit, uint32_t prefix, uint32_t* tables) {
  const uint32_t higher = digit.shift + digit.bits < 32 ? ~0u << (digit.shift + digit.bits) : 0u;
  const uint32_t mask = (1u << digit.bits) - 1;
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t lane = 0; lane < rows; ++lane) {
      const uint32_t bits = float_to_bits(scores[j * kLanes + lane]);
      if (((bits ^ prefix) & higher) == 0) ++tables[(lane & 1) * kBuckets + (bits >> digit.shift & mask)];
    }
  }
}

Histogram count_digit(const PanelScores& scores, Digit digit, uint32_t prefix, const Executor& executor) {
  Histogram total(kBuckets, 0);
  std::mutex merging;
  parallel_for(executor, ceil_div(scores.rows, kLanes), 4, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> tables(2 * kBuckets);
    for (int64_t panel = begin; panel < end; ++panel) {
      std::fill(tables.begin(), tables.end(), 0u);
      const int64_t rows = std::min(kLanes, scores.rows - panel * kLanes);
      count_panel(scores.data + panel * scores.panel_stride, scores.columns, rows, digit, prefix, tables.data());
      const std::lock_guard<std::mutex> lock(merging);
      for (int64_t bucket = 0; bucket < kBuckets; ++bucket) total[bucket] += tables[bucket] + tables[kBuckets + bucket];
    }
  });
  return total;
}

}  // namespace

Threshold select_threshold(const PanelScores& scores, int64_t kept, const Executor& executor) {
  uint32_t prefix = 0;
  int64_t wanted = kept;  // rank among the scores that share the prefix, counted from the largest
  int64_t equal = 0;
  for (const Digit digit : kDigits) {
    const Histogram histogram = count_digit(scores, digit, prefix, executor);
    int64_t bucket = (int64_t{1} << digit.bits) - 1;
    while (histogram[bucket] < wanted) wanted -= histogram[bucket--];
    equal = histogram[bucket];
    prefix |= static_cast<uint32_t>(bucket) << digit.shift;
  }
  return {bits_to_float(prefix), wanted, equal};
}

}  // namespace sparsekern::cpu
