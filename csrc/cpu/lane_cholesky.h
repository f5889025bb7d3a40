// Sixteen small positive definite systems at once, one per lane: gathered, factored and solved without a horizontal operation.
//
// Floor: size^3 / 6 multiply-adds per lane. A tile of the factor is a dot product of rows. The lanes of one element are stored side
// by side, so that every operand is a whole vector and a tile of 4 x 4 needs 8 loads for 16 multiply-adds.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/panels.h"

namespace sparsekern::cpu {

// A pivot below this share of its (unit) diagonal entry is rounding error: the system has no meaningful solution.
constexpr float kSmallestLanePivot = 32.0f * FLT_EPSILON;

template <class Target>
class LaneCholesky {
 public:
  using Float = typename VectorOf<Target::kWidth>::Float;

  explicit LaneCholesky(int64_t largest)
      : rows_(allocate<float>(offset(round_up(largest, kStep)))), reciprocal_(allocate<float>(round_up(largest, kStep) * kLanes)) {}

  // Gathers matrix[support[l], support[l]] into lane l. The matrix is symmetric with `stride` columns and a unit diagonal; supports
  // are ascending.
  SPARSEKERN_INLINE void gather(const float* matrix, int64_t stride, const std::vector<int32_t> (&support)[kLanes]) {
    size_ = 0;
    for (const auto& s : support) size_ = std::max<int64_t>(size_, static_cast<int64_t>(s.size()));
    size_ = round_up(size_, kStep);
    std::vector<int32_t> index(static_cast<size_t>(size_ * kLanes), 0);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (size_t a = 0; a < support[lane].size(); ++a) index[a * kLanes + lane] = support[lane][a];
    }
    for (int64_t a = 0; a < size_; ++a) {
      float* row = rows_.get() + offset(a);
      const float* source[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) source[lane] = matrix + index[a * kLanes + lane] * stride;
      for (int64_t b = 0; b <= a; ++b) {
        for (int64_t lane = 0; lane < kLanes; ++lane) row[b * kLanes + lane] = source[lane][index[b * kLanes + lane]];
      }
    }
    // Rows past the last of a lane are those of the identity.
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t a = static_cast<int64_t>(support[lane].size()); a < size_; ++a) {
        float* row = rows_.get() + offset(a);
        for (int64_t b = 0; b < a; ++b) row[b * kLanes + lane] = 0.0f;
        row[a * kLanes + lane] = 1.0f;
      }
    }
  }

  // Solves in place: `solution` is [size][16], the right-hand sides on entry. Returns a bit for each lane whose system is not
  // positive definite, and whose solution is meaningless.
  SPARSEKERN_INLINE uint32_t solve(float* solution) {
    uint32_t failed = 0;
    for (int64_t part = 0; part < kLanes; part += Target::kWidth) failed |= factor(part) << part;
    for (int64_t part = 0; part < kLanes; part += Target::kWidth) substitute(solution + part, part);
    return failed;
  }

  int64_t size() const { return size_; }

 private:
  static constexpr int64_t kStep = 4;                             // columns that rows are padded to
  static constexpr int kTile = Target::kWidth == kLanes ? 4 : 2;  // the largest tile that fits the registers

  // Rows are as long as the last row of their group of four.
  static constexpr int64_t offset(int64_t row) {
    const int64_t group = row / kStep;
    return (kStep * kStep * group * (group + 1) / 2 + row % kStep * kStep * (group + 1)) * kLanes;
  }

  SPARSEKERN_INLINE Float* row(int64_t a, int64_t part) { return reinterpret_cast<Float*>(rows_.get() + offset(a) + part); }
  static constexpr int64_t kNext = kLanes / Target::kWidth;  // vectors from one element of a row to the next

  SPARSEKERN_INLINE uint32_t factor(int64_t part) {
    uint32_t failed = 0;
    for (int64_t i = 0; i < size_; i += kTile) {
      for (int64_t j = 0; j <= i; j += kTile) {
        Float tile[kTile][kTile] = {};
        const Float* left[kTile];
        const Float* right[kTile];
        for (int x = 0; x < kTile; ++x) left[x] = row(i + x, part), right[x] = row(j + x, part);
        for (int64_t k = 0; k < j; ++k) {
#pragma GCC unroll 4
          for (int x = 0; x < kTile; ++x) {
#pragma GCC unroll 4
            for (int y = 0; y < kTile; ++y) tile[x][y] += left[x][k * kNext] * right[y][k * kNext];
          }
        }
        failed |= i == j ? finish_diagonal(i, part, tile) : finish_tile(i, j, part, tile);
      }
    }
    return failed;
  }

  SPARSEKERN_INLINE uint32_t finish_tile(int64_t i, int64_t j, int64_t part, Float (&sum)[kTile][kTile]) {
    for (int x = 0; x < kTile; ++x) {
      Float* out = row(i + x, part) + j * kNext;
      for (int y = 0; y < kTile; ++y) {
        Float value = out[y * kNext] - sum[x][y];
        for (int z = 0; z < y; ++z) value -= out[z * kNext] * row(j + y, part)[(j + z) * kNext];
        out[y * kNext] = value * reciprocal(j + y, part);
      }
    }
    return 0;
  }

  SPARSEKERN_INLINE uint32_t finish_diagonal(int64_t i, int64_t part, Float (&sum)[kTile][kTile]) {
    uint32_t failed = 0;
    for (int x = 0; x < kTile; ++x) {
      Float* out = row(i + x, part) + i * kNext;
      for (int y = 0; y <= x; ++y) {
        Float value = out[y * kNext] - sum[x][y];
        for (int z = 0; z < y; ++z) value -= out[z * kNext] * row(i + y, part)[(i + z) * kNext];
        if (y < x) {
          out[y * kNext] = value * reciprocal(i + y, part);
          continue;
        }
        Float inverse;
        for (int lane = 0; lane < Target::kWidth; ++lane) {
          const bool positive = value[lane] >= kSmallestLanePivot;
          failed |= static_cast<uint32_t>(!positive) << lane;
          inverse[lane] = positive ? 1.0f / std::sqrt(value[lane]) : 0.0f;
        }
        reciprocal(i + x, part) = inverse;
        out[x * kNext] = value * inverse;
      }
    }
    return failed;
  }

  SPARSEKERN_INLINE Float& reciprocal(int64_t a, int64_t part) {
    return *reinterpret_cast<Float*>(reciprocal_.get() + a * kLanes + part);
  }

  SPARSEKERN_INLINE void substitute(float* solution, int64_t part) {
    auto* x = reinterpret_cast<Float*>(solution);
    for (int64_t a = 0; a < size_; ++a) {
      const Float* factor = row(a, part);
      Float sum[4] = {};
      for (int64_t b = 0; b < a; b += 4) {
        for (int64_t u = 0; u < std::min<int64_t>(4, a - b); ++u) sum[u] += factor[(b + u) * kNext] * x[(b + u) * kNext];
      }
      x[a * kNext] = (x[a * kNext] - ((sum[0] + sum[1]) + (sum[2] + sum[3]))) * reciprocal(a, part);
    }
    for (int64_t a = size_ - 1; a >= 0; --a) {
      const Float* factor = row(a, part);
      const Float value = x[a * kNext] * reciprocal(a, part);
      x[a * kNext] = value;
      for (int64_t b = 0; b < a; ++b) x[b * kNext] -= factor[b * kNext] * value;
    }
  }

  int64_t size_ = 0;
  Buffer<float> rows_;
  Buffer<float> reciprocal_;
};

}  // namespace sparsekern::cpu
