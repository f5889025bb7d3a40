// The state of obs_sweep, and its inner loop: the recurrence inside a block of columns.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/panel_matrix.h"

namespace sparsekern::cpu {

// A block of columns and the triangle of V that its recurrence needs.
struct Block {
  int64_t begin = 0, end = 0;
  std::vector<float> inside;      // transposed: inside[j * size + i] = V[begin + i, begin + j], i < j
  std::vector<float> diagonal;    // |V_jj|, 0 for a dead feature
  std::vector<float> reciprocal;  // 1 / V_jj, 0 for a dead feature

  int64_t size() const { return end - begin; }
};

struct Sweep {
  const SweepPattern& pattern;
  int64_t rows, columns;
  bool among;            // N:M chooses among the weights that `keep` holds in the beginning
  Buffer<float> delta;   // D in panels; the columns of the current block first hold their pending sums
  Buffer<int8_t> keep;   // the mask in panels: -1 where kept, 0 where pruned
  Buffer<float> scores;  // scores of the current block, in panels
  std::vector<double> row_error;
  const float* scales = nullptr;  // of 4-bit values, in panels of blocks of 64 columns; null: kept weights are not rounded

  int64_t panels() const { return ceil_div(rows, kLanes); }
  int64_t panel_stride() const { return columns * kLanes; }
  float* delta_at(int64_t panel, int64_t column) const { return delta.get() + panel * panel_stride() + column * kLanes; }
  int8_t* keep_at(int64_t panel, int64_t column) const { return keep.get() + panel * panel_stride() + column * kLanes; }
  const float* scales_at(int64_t panel, int64_t column) const {
    return scales + (panel * nm_q4::blocks(columns) + column / nm_q4::kColumns) * kLanes;
  }
};

// Several panels of rows in one block, in panels of the block's columns: the weights, given on entry and pruned on exit, and
// scratch.
struct Tile {
  int64_t panel, panels;
  float* weight;
  float* scratch;

  int64_t weight_stride(const Block& block) const { return block.size() * kLanes; }
};

// The recurrence inside a block, for kPanels panels of rows at once.
template <class Target, int kPanels>
struct Recurrence {
  using Columns = Column<Target, kPanels>;
  using Vectors = VectorOf<Target::kWidth>;
  using Float = typename Vectors::Float;
  using Int = typename Vectors::Int;
  using Byte = typename Vectors::Byte;
  static constexpr int kRegisters = Columns::kRegisters;

  const Sweep& sweep;
  const Block& block;
  int64_t panel;
  float* weight;          // the tile's weights
  float* scratch;         // scratch of the same size
  int64_t stride;         // floats between panels of sweep.delta
  int64_t weight_stride;  // floats between panels of weight and of scratch

  static SPARSEKERN_INLINE Float absolute(Float x) {
    const Int bits = reinterpret_cast<const Int&>(x) & 0x7fffffff;
    return reinterpret_cast<const Float&>(bits);
  }

  SPARSEKERN_INLINE float* pending(int64_t j) const { return sweep.delta_at(panel, block.begin + j); }
  SPARSEKERN_INLINE const float* coefficients(int64_t j) const { return block.inside.data() + j * block.size(); }

  // pending[j] += sum over source columns i in [first, last) of source_i V_ij, for j in [j, j + kColumns).
  template <int kColumns>
  SPARSEKERN_INLINE void add_columns(
      const float* source, int64_t source_stride, float* out, int64_t out_stride, int64_t first, int64_t last, int64_t j) const {
    Columns sums[kColumns];
    for (int c = 0; c < kColumns; ++c) sums[c] = Columns::load(out + (j + c) * kLanes, out_stride);
    add_combination<Target, kPanels, kColumns>(
        last - first, source + first * kLanes, source_stride, coefficients(j) + first, block.size(), sums);
    for (int c = 0; c < kColumns; ++c) sums[c].store(out + (j + c) * kLanes, out_stride);
  }

  // The same for any number of columns from j on; four at a time share the loads of the source.
  SPARSEKERN_INLINE void add_to_group(
      const float* source, int64_t source_stride, float* out, int64_t out_stride, int64_t first, int64_t last, int64_t j,
      int64_t columns) const {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) add_columns<4>(source, source_stride, out, out_stride, first, last, j + c);
    for (; c < columns; ++c) add_columns<1>(source, source_stride, out, out_stride, first, last, j + c);
  }

  // y = pending V_bb^-1 for columns [first, last): what the columns before them would add to each weight. Written to `out`, in
  // place.
  SPARSEKERN_INLINE void solve(float* out, int64_t out_stride, int64_t first, int64_t last) const {
    constexpr int64_t kStep = 4;
    for (int64_t j = first; j < last; j += kStep) {
      const int64_t columns = std::min(kStep, last - j);
      for (int64_t c = 0; c < columns; ++c) {
        // Solved columns are stored negated, so that they are subtracted by the same multiply-adds.
        if (c == 0) add_to_group(out, out_stride, out, out_stride, first, j, j, columns);
        if (c > 0) add_columns<1>(out, out_stride, out, out_stride, j, j + c, j + c);
        Columns column = Columns::load(out + (j + c) * kLanes, out_stride);
        const float factor = -block.reciprocal[j + c];
        for (int r = 0; r < kRegisters; ++r) column.part[r] *= factor;
        column.store(out + (j + c) * kLanes, out_stride);
      }
    }
  }

  // Stores the error of removing each weight of column j, |current weight| V_jj, over the negated solution in `out`.
  SPARSEKERN_INLINE void score(float* out, int64_t out_stride, int64_t j) const {
    const Columns start = Columns::load(weight + j * kLanes, weight_stride);
    Columns column = Columns::load(out + j * kLanes, out_stride);
    for (int r = 0; r < kRegisters; ++r) column.part[r] = absolute(start.part[r] - column.part[r]) * block.diagonal[j];
    column.store(out + j * kLanes, out_stride);
  }

  // Scores the whole block before any of it is pruned.
  SPARSEKERN_INLINE void score_block(float* scores) const {
    for (int64_t j = 0; j < block.size(); ++j) Columns::load(pending(j), stride).store(scores + j * kLanes, weight_stride);
    solve(scores, weight_stride, 0, block.size());
    for (int64_t j = 0; j < block.size(); ++j) score(scores, weight_stride, j);
  }

  // Chooses the n largest of each group of m columns from j on, by counting how many come before each; of equal ones the first
  // wins. Weights that may not be kept come last.
  SPARSEKERN_INLINE void choose_group(int64_t j, int64_t n, int64_t m) const {
    for (int64_t c = j; c < j + m; ++c) Columns::load(pending(c), stride).store(scratch + c * kLanes, weight_stride);
    solve(scratch, weight_stride, j, j + m);
    for (int64_t c = j; c < j + m; ++c) score(scratch, weight_stride, c);
    for (int64_t c = j; c < (sweep.among ? j + m : j); ++c) put_last(scratch, c);
    for (int64_t c = j; c < j + m; ++c) {
      const Columns own = Columns::load(scratch + c * kLanes, weight_stride);
      Int before[kRegisters] = {};
      for (int64_t other = j; other < j + m; ++other) {
        const Columns theirs = Columns::load(scratch + other * kLanes, weight_stride);
        for (int r = 0; r < kRegisters; ++r) {
          if (other < c) before[r] -= theirs.part[r] >= own.part[r];
          if (other > c) before[r] -= theirs.part[r] > own.part[r];
        }
      }
      for (int r = 0; r < kRegisters; ++r) {
        const Int best = before[r] < static_cast<int32_t>(n);
        store_keep(c, r, sweep.among ? best & load_keep(c, r) : best);
      }
    }
  }

  // Gives weights of column j that may not be kept a score below all others.
  SPARSEKERN_INLINE void put_last(float* scores, int64_t j) const {
    Columns own = Columns::load(scores + j * kLanes, weight_stride);
    for (int r = 0; r < kRegisters; ++r) {
      const Int allowed = load_keep(j, r);
      const Float below = Float{} - 1.0f;
      const Int bits = (reinterpret_cast<const Int&>(own.part[r]) & allowed) | (reinterpret_cast<const Int&>(below) & ~allowed);
      own.part[r] = reinterpret_cast<const Float&>(bits);
    }
    own.store(scores + j * kLanes, weight_stride);
  }

  SPARSEKERN_INLINE int8_t* keep_register(int64_t j, int r) const {
    return sweep.keep_at(panel + r / Columns::kParts, block.begin + j) + r % Columns::kParts * Target::kWidth;
  }
  SPARSEKERN_INLINE void store_keep(int64_t j, int r, Int kept) const {
    *reinterpret_cast<Byte*>(keep_register(j, r)) = __builtin_convertvector(kept, Byte);
  }
  SPARSEKERN_INLINE Int load_keep(int64_t j, int r) const {
    return __builtin_convertvector(*reinterpret_cast<const Byte*>(keep_register(j, r)), Int);
  }

  // Returns register r of column j rounded to the nearest of -8 to 7 times the scales of its rows.
  SPARSEKERN_INLINE Float rounded(Float now, int64_t j, int r) const {
    const float* scales = sweep.scales_at(panel + r / Columns::kParts, block.begin + j) + r % Columns::kParts * Target::kWidth;
    const Float scale = *reinterpret_cast<const Float*>(scales);
    const Float zero{}, one = zero + 1.0f, least = zero - 8.0f, most = zero + 7.0f, rounder = zero + 0x1.8p23f;
    Float code = now / (scale == zero ? one : scale);
    code = code < least ? least : code > most ? most : code;
    code = (code + rounder) - rounder;
    return scale * code + zero;  // no -0.0
  }

  // Finishes column j, whose pending sum is complete: prunes it, records the change of its weights, and adds to the rows' errors.
  SPARSEKERN_INLINE void finish_column(int64_t j, Columns& error) const {
    const Columns sum = Columns::load(pending(j), stride);
    Columns start = Columns::load(weight + j * kLanes, weight_stride);
    Columns taken;
    const bool dead = block.diagonal[j] == 0.0f;
    for (int r = 0; r < kRegisters; ++r) {
      const Float now = start.part[r] + sum.part[r] * block.reciprocal[j];
      const Float value = sweep.scales == nullptr ? now : rounded(now, j, r);
      const Int kept_bits = reinterpret_cast<const Int&>(value) & load_keep(j, r);
      const Float kept = dead ? Float{} : reinterpret_cast<const Float&>(kept_bits);
      const Float column_error = dead ? Float{} : (now - kept) * block.diagonal[j];
      error.part[r] += column_error * column_error;
      taken.part[r] = dead ? Float{} : start.part[r] - kept;
      start.part[r] = kept;
    }
    start.store(weight + j * kLanes, weight_stride);
    taken.store(pending(j), stride);
  }

  // Prunes the block's columns in groups of `group`; n > 0 chooses each group's mask when it is reached.
  SPARSEKERN_INLINE void run(int64_t n, int64_t group, float* row_error) const {
    Columns error = {};
    for (int64_t j = 0; j < block.size(); j += group) {
      const int64_t columns = std::min(group, block.size() - j);
      add_to_group(pending(0), stride, pending(0), stride, 0, j, j, columns);
      if (n > 0) choose_group(j, n, group);
      for (int64_t c = 0; c < columns; ++c) {
        if (c > 0) add_columns<1>(pending(0), stride, pending(0), stride, j, j + c, j + c);
        finish_column(j + c, error);
      }
    }
    error.store(row_error, kLanes);
  }
};

template <class Target, int kPanels>
SPARSEKERN_INLINE Recurrence<Target, kPanels> recurrence(const Sweep& sweep, const Block& block, const Tile& tile, int64_t p) {
  const int64_t offset = p * tile.weight_stride(block);
  return {
      sweep, block, tile.panel + p, tile.weight + offset, tile.scratch + offset, sweep.panel_stride(), tile.weight_stride(block)};
}

template <class Target>
SPARSEKERN_INLINE void score_tile(const Sweep& sweep, const Block& block, const Tile& tile) {
  float* scores = sweep.scores.get() + tile.panel * block.size() * kLanes;
  int64_t p = 0;
  for (; p + Target::kTilePanels <= tile.panels; p += Target::kTilePanels) {
    recurrence<Target, Target::kTilePanels>(sweep, block, tile, p).score_block(scores + p * block.size() * kLanes);
  }
  for (; p < tile.panels; ++p) recurrence<Target, 1>(sweep, block, tile, p).score_block(scores + p * block.size() * kLanes);
}

template <class Target>
SPARSEKERN_INLINE void run_tile(const Sweep& sweep, const Block& block, const Tile& tile, float* row_error) {
  const int64_t n = sweep.pattern.n;
  const int64_t group = n > 0 ? sweep.pattern.m : 4;
  int64_t p = 0;
  for (; p + Target::kTilePanels <= tile.panels; p += Target::kTilePanels) {
    recurrence<Target, Target::kTilePanels>(sweep, block, tile, p).run(n, group, row_error + p * kLanes);
  }
  for (; p < tile.panels; ++p) recurrence<Target, 1>(sweep, block, tile, p).run(n, group, row_error + p * kLanes);
}

}  // namespace sparsekern::cpu
