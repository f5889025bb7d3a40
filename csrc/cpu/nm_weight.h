// A weight in the N:M layout, as packed_linear.h multiplies by it, and the check of its positions.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/nm_multiply.h"
#include "cpu/nm_multiply_avx2.h"
#include "cpu/packed_linear.h"
#include "cpu/slot_floats.h"

namespace sparsekern::cpu {

template <class T>
struct NmWeight {
  int64_t rows, columns;
  NmRows packed;
  int64_t stored;  // values stored per row
  int code_bits;
  std::vector<int32_t> group_columns;
  Isa isa = current_isa();                          // read once, because it reads the environment
  ByStreams<nm_multiply::Multiply> multiply_by[4];  // 1, 2, 4 and 8 tokens
#if SPARSEKERN_X86
  nm_multiply::MultiplyEight multiply_eight_by[4];  // the same, with AVX2
#endif

  NmWeight(const NmRows& p, int64_t columns_)
      : rows(p.rows),
        columns(columns_),
        packed(p),
        stored(packed_rows::stored_per_row(columns_, p.n, p.m, sizeof(T))),
        code_bits(static_cast<int>(packed_rows::code_bits(p.m))),
        // The padding of the last block is multiplied by the zeros after the last column of x.
        group_columns(static_cast<size_t>(stored), static_cast<int32_t>(packed_rows::words(columns_) * packed_rows::kWordColumns)) {
    multiply_by[0] = nm_multiply::choose_multiply<T, 1>(isa, p.n, p.m);
    multiply_by[1] = nm_multiply::choose_multiply<T, 2>(isa, p.n, p.m);
    multiply_by[2] = nm_multiply::choose_multiply<T, 4>(isa, p.n, p.m);
    multiply_by[3] = nm_multiply::choose_multiply<T, 8>(isa, p.n, p.m);
#if SPARSEKERN_X86
    multiply_eight_by[0] = nm_multiply::choose_multiply_eight<T, 1>(p.n, p.m);
    multiply_eight_by[1] = nm_multiply::choose_multiply_eight<T, 2>(p.n, p.m);
    multiply_eight_by[2] = nm_multiply::choose_multiply_eight<T, 4>(p.n, p.m);
    multiply_eight_by[3] = nm_multiply::choose_multiply_eight<T, 8>(p.n, p.m);
#endif
    auto column = group_columns.begin();
    for (int64_t first = 0; first < columns; first += p.m) column = std::fill_n(column, p.n, static_cast<int32_t>(first));
  }

  int64_t first_tile(int64_t task, int64_t tasks) const { return packed_rows::tiles(rows) * task / tasks; }

  const packed_rows::Slot* slots_of(int64_t row) const {
    return static_cast<const packed_rows::Slot*>(packed.values) + row * stored / kSlotValues<T>;
  }
  const uint32_t* codes_of(int64_t row) const { return packed.codes + row * stored * code_bits / 32; }

  int64_t bytes() const { return rows * stored * (static_cast<int64_t>(sizeof(T)) * 8 + code_bits) / 8; }

  nm_multiply::Factors factors_of(const float* x, int64_t x_stride) const {
    return {stored / (packed_rows::kBlockSlots * kSlotValues<T>), group_columns.data(), code_bits, packed.n, x, x_stride};
  }

  bool multiply(const int64_t* tiles, int64_t given, const TokenBlock& block, TileSums* sums) const {
#if SPARSEKERN_X86
    if (isa == Isa::avx2) {
      for (int64_t i = 0; i < given; ++i) multiply_tile_by_eight(tiles[i], block, sums[i]);
      return true;
    }
#endif
    for (int64_t row = 0; row < packed_rows::kTileRows; ++row) {
      nm_multiply::Row some_rows[kStreams];
      int64_t some = 0;
      for (; some < given && tiles[some] * packed_rows::kTileRows + row < rows; ++some) {  // only the last tile may be short
        const int64_t i = tiles[some] * packed_rows::kTileRows + row;
        some_rows[some] = {slots_of(i), codes_of(i), &sums[some][0][row]};
      }
      if (some == 0) break;
      nm_multiply::Factors factors = factors_of(block.x, block.x_stride);
      for_token_groups(block.tokens, [&](int power) {
        multiply_by[power].of(some)(factors, some_rows);
        factors.x += block.x_stride << power;
        for (int64_t i = 0; i < some; ++i) some_rows[i].sums += packed_rows::kTileRows << power;
        return true;
      });
    }
    return true;
  }

#if SPARSEKERN_X86

  void multiply_tile_by_eight(int64_t tile, const TokenBlock& block, TileSums& sums) const {
    const int64_t first = tile * packed_rows::kTileRows, end = std::min(rows, first + packed_rows::kTileRows);
    int64_t row = first;
    for (; row + 8 <= end; row += 8) multiply_eight(row, stored / kSlotValues<T>, block, &sums[0][row - first]);
    for (; row < end; ++row) {  // the last rows, each as eight that are the same
      TileSums same;
      multiply_eight(row, 0, block, same[0]);
      for (int64_t token = 0; token < block.tokens; ++token) sums[token][row - first] = same[token][0];
    }
  }

  void multiply_eight(int64_t row, int64_t slots_a_row, const TokenBlock& block, float* sums) const {
    const int64_t codes_a_row = slots_a_row == 0 ? 0 : stored * code_bits / 32;
    const auto [blocks, columns_of, bits, n, x, x_stride] = factors_of(block.x, block.x_stride);
    nm_multiply::EightRows eight{slots_of(row), codes_of(row), slots_a_row, codes_a_row, blocks, columns_of, x, x_stride};
    for_token_groups(block.tokens, [&](int power) {
      multiply_eight_by[power](eight, sums);
      eight.x += block.x_stride << power;
      sums += packed_rows::kTileRows << power;
      return true;
    });
  }

#endif

  bool expand(int64_t tile, float* panel) const {
    std::fill_n(panel, columns * kLanes, 0.0f);
    const int64_t first = tile * packed_rows::kTileRows;
#if SPARSEKERN_X86
    if (isa >= Isa::avx512) {
      nm_multiply::Row tile_rows[kLanes];
      const int count = static_cast<int>(std::min(packed_rows::kTileRows, rows - first));
      for (int row = 0; row < count; ++row) tile_rows[row] = {slots_of(first + row), codes_of(first + row), nullptr};
      const auto expand_panel =
          code_bits == 2 ? &nm_multiply::expand_panel_avx512<T, false> : &nm_multiply::expand_panel_avx512<T, true>;
      return expand_panel(factors_of(nullptr, 0), tile_rows, count, columns / packed.m * packed.n, columns, panel);
    }
#endif
    return for_each_value(
        tile, [=](int64_t row, int64_t column, T value) { panel[column * kLanes + row - first] = to_float(value); });
  }

  bool expand_rows(int64_t tile, T* weight) const {
    const int64_t first = tile * packed_rows::kTileRows, end = std::min(rows, first + packed_rows::kTileRows);
    std::fill_n(weight + first * columns, (end - first) * columns, T{});
    return for_each_value(tile, [=](int64_t row, int64_t column, T value) { weight[row * columns + column] = value; });
  }

  // Calls f(row, column, value) for each value of a tile.
  template <class F>
  bool for_each_value(int64_t tile, const F& f) const {
    const int64_t first = tile * packed_rows::kTileRows, end = std::min(rows, first + packed_rows::kTileRows);
    for (int64_t row = first; row < end; ++row) {
      const T* values = reinterpret_cast<const T*>(slots_of(row));
      const uint32_t* codes = codes_of(row);
      for (int64_t k = 0; k < columns / packed.m * packed.n; ++k) {
        const int64_t column = group_columns[static_cast<size_t>(k)] + nm_multiply::position_of(codes, k, code_bits);
        if (column >= columns) return false;
        f(row, column, values[packed_rows::place_of(k, sizeof(T))]);
      }
    }
    return true;
  }
};

inline void check_codes(bool sound) {
  if (!sound) throw std::invalid_argument("codes: expected positions below m, got one past the last column");
}

}  // namespace sparsekern::cpu
