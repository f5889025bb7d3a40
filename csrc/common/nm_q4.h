// The layout of N:M weights with 4-bit values for `nm_q4_linear`. Its Python mirror, sparsekern/layouts/nm_q4.py, describes it.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace sparsekern::nm_q4 {

constexpr int64_t kColumns = 64;  // of a block, which share a scale in each row
constexpr int64_t kQuarters = 4;
constexpr int64_t kQuarterColumns = kColumns / kQuarters;
constexpr int64_t kRun = 32;  // bytes of a register
constexpr int kZero = 8;      // the stored form of the value 0

SPARSEKERN_HOST_DEVICE constexpr bool has_layout(int64_t n, int64_t m) {
  return (n == 2 && m == 4) || (n == 1 && m == 4) || (n == 4 && m == 16);
}

SPARSEKERN_HOST_DEVICE constexpr int64_t blocks(int64_t columns) { return (columns + kColumns - 1) / kColumns; }

// Sizes of a block, and the places of its parts.
struct Layout {
  int64_t n, m;

  SPARSEKERN_HOST_DEVICE constexpr int64_t kept() const { return kQuarterColumns * n / m; }  // values of a row in a quarter
  SPARSEKERN_HOST_DEVICE constexpr int64_t run_rows() const { return kRun / kept(); }        // rows of a register
  SPARSEKERN_HOST_DEVICE constexpr int64_t rows() const { return 2 * run_rows(); }
  SPARSEKERN_HOST_DEVICE constexpr bool wide() const { return m > 4; }  // positions of 4 bits instead of 2
  SPARSEKERN_HOST_DEVICE constexpr int64_t scales_at() const { return wide() ? 8 * kRun : 6 * kRun; }
  SPARSEKERN_HOST_DEVICE constexpr int64_t bytes() const { return scales_at() + 2 * rows(); }
  SPARSEKERN_HOST_DEVICE constexpr int64_t strips(int64_t weight_rows) const { return (weight_rows + rows() - 1) / rows(); }

  // Bits `shift` and up of byte `byte`.
  struct Place {
    int64_t byte;
    int shift;
  };

  // The position in its group of value k of a row in a quarter.
  SPARSEKERN_HOST_DEVICE constexpr Place position(int64_t row, int64_t quarter, int64_t k) const {
    const int64_t half = row / run_rows(), lane = row % run_rows() * kept() + k;
    return wide() ? Place{2 * kRun * quarter + lane, static_cast<int>(4 * half)}
                  : Place{kRun * half + lane, static_cast<int>(2 * quarter)};
  }

  // The value itself, plus kZero.
  SPARSEKERN_HOST_DEVICE constexpr Place value(int64_t row, int64_t quarter, int64_t k) const {
    const int64_t half = row / run_rows(), lane = row % run_rows() * kept() + k;
    return wide() ? Place{2 * kRun * quarter + kRun + lane, static_cast<int>(4 * half)}
                  : Place{2 * kRun + 2 * kRun * (quarter / 2) + kRun * half + lane, static_cast<int>(4 * (quarter % 2))};
  }

  SPARSEKERN_HOST_DEVICE constexpr int64_t position_mask() const { return wide() ? 15 : 3; }

  // The first column of the group of value k, from the first of its block.
  SPARSEKERN_HOST_DEVICE constexpr int64_t group_column(int64_t quarter, int64_t k) const {
    return quarter * kQuarterColumns + k / n * m;
  }
};

static_assert(Layout{2, 4}.bytes() == 208 && Layout{1, 4}.bytes() == 224 && Layout{4, 16}.bytes() == 288, "3.25, 1.75, 2.25 bits");

}  // namespace sparsekern::nm_q4
