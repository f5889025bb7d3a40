// A weight in the bitmask layout, as packed_linear.h multiplies by it, and the checks of its tensors.
#pragma once

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/bitmask_multiply.h"
#include "cpu/bitmask_rows.h"
#include "cpu/kernels.h"
#include "cpu/packed_linear.h"
#include "cpu/slot_floats.h"

namespace sparsekern::cpu {

template <class T>
struct BitmaskWeight {
  int64_t rows, columns;
  BitmaskRows packed;
  const Slot* slots;
  int64_t count;  // slots without the slack
  int64_t words;
  std::vector<uint64_t> no_bits;  // all zero: the bits of the row that the last group may lack
  Isa isa = current_isa();        // read once, because it reads the environment
  ByStreams<bitmask_multiply::Multiply> multiply_by[4] = {
      bitmask_multiply::choose_multiply<T, 1>(isa), bitmask_multiply::choose_multiply<T, 2>(isa),
      bitmask_multiply::choose_multiply<T, 4>(isa), bitmask_multiply::choose_multiply<T, 8>(isa)};

  BitmaskWeight(const BitmaskRows& p, int64_t columns_)
      : rows(p.rows),
        columns(columns_),
        packed(p),
        slots(static_cast<const Slot*>(p.values)),
        count(p.value_count / kSlotValues<T> - packed_rows::kSlack),
        words(packed_rows::words(columns_)),
        no_bits(static_cast<size_t>(words)) {}

  int64_t bytes() const {
    const int64_t own = packed.starts[packed_rows::tiles(rows)] - packed.starts[0];
    return own * static_cast<int64_t>(sizeof(Slot)) + rows * words * 8;
  }

  // Splits the tiles into tasks with about equal numbers of values.
  int64_t first_tile(int64_t task, int64_t tasks) const {
    const int64_t tiles = packed_rows::tiles(rows);
    if (task == tasks) return tiles;
    const int64_t begin = packed.starts[0], all = packed.starts[tiles] - begin;
    const int64_t slot = begin + all / tasks * task + all % tasks * task / tasks;
    return task == 0 ? 0 : std::lower_bound(packed.starts, packed.starts + tiles, slot) - packed.starts;
  }

  const uint64_t* bits_of(int64_t row) const { return row < rows ? packed.bits + row * words : no_bits.data(); }

  bool multiply(const int64_t* tiles, int64_t given, const TokenBlock& block, TileSums* sums) const {
    const Slot* next[kStreams];
    for (int64_t i = 0; i < given; ++i) next[i] = slots + packed.starts[tiles[i]];
    for (int64_t row = 0; row < packed_rows::kTileRows; row += kSlotValues<T>) {
      bitmask_multiply::Group groups[kStreams];
      int64_t some = 0;
      for (; some < given && tiles[some] * packed_rows::kTileRows + row < rows; ++some) {  // only the last tile may be short
        const int64_t first = tiles[some] * packed_rows::kTileRows + row;
        groups[some] = {next[some], {bits_of(first), bits_of(first + 1)}, &sums[some][0][row]};
      }
      if (some == 0) break;
      if (!multiply_groups(groups, some, block)) return false;
      for (int64_t i = 0; i < some; ++i) next[i] = groups[i].slots;
    }
    return true;
  }

  bool multiply_groups(bitmask_multiply::Group* groups, int64_t some, const TokenBlock& block) const {
    bitmask_multiply::Factors factors{slots + count, words, block.x, block.x_stride};
    const Slot* first[kStreams];
    for (int64_t i = 0; i < some; ++i) first[i] = groups[i].slots;
    return for_token_groups(block.tokens, [&](int power) {
      for (int64_t i = 0; i < some; ++i) groups[i].slots = first[i];
      if (!multiply_by[power].of(some)(factors, groups)) return false;
      factors.x += block.x_stride << power;
      for (int64_t i = 0; i < some; ++i) groups[i].sums += packed_rows::kTileRows << power;
      return true;
    });
  }

  bool expand(int64_t tile, float* panel) const {
    const int64_t first = tile * packed_rows::kTileRows;
#if SPARSEKERN_X86
    if (isa >= Isa::avx512) {
      const std::optional<TileRows> found = rows_of(tile);
      if (!found) return false;
      if (found->rows < kLanes) std::fill_n(panel, columns * kLanes, 0.0f);
      expand_panel_avx512<T>(*found, columns, panel);
      return true;
    }
#endif
    std::fill_n(panel, columns * kLanes, 0.0f);
    return for_each_value(
        tile, [=](int64_t row, int64_t column, T value) { panel[column * kLanes + row - first] = to_float(value); });
  }

  // Returns nothing if the bits refer to more values or columns than exist.
  std::optional<TileRows> rows_of(int64_t tile) const {
    const int64_t first = tile * packed_rows::kTileRows;
    const int64_t left_out = words * packed_rows::kWordColumns - columns;  // bits of the last word
    TileRows found{{}, {}, static_cast<int>(std::min(packed_rows::kTileRows, rows - first))};
    const Slot* next = slots + packed.starts[tile];
    for (int row = 0; row < found.rows; row += kSlotValues<T>) {
      int64_t longest = 0;
      for (int i = row; i < std::min(found.rows, row + kSlotValues<T>); ++i) {
        found.slots[i] = next;
        found.bits[i] = bits_of(first + i);
        if (left_out != 0 && found.bits[i][words - 1] >> (packed_rows::kWordColumns - left_out) != 0) return {};
        int64_t values = 0;
        for (int64_t word = 0; word < words; ++word) values += __builtin_popcountll(found.bits[i][word]);
        longest = std::max(longest, values);
      }
      next += longest;
      if (next > slots + count) return {};
    }
    return found;
  }

  // Writes the tile's rows to the dense weight.
  bool expand_rows(int64_t tile, T* weight) const {
    const int64_t first = tile * packed_rows::kTileRows, end = std::min(rows, first + packed_rows::kTileRows);
#if SPARSEKERN_X86
    if constexpr (sizeof(T) == 2) {
      if (isa >= Isa::avx512) {
        const Slot* next = slots + packed.starts[tile];
        for (int64_t row = first; row < end && next != nullptr; row += 2) {
          auto* out = reinterpret_cast<uint16_t*>(weight);
          next = expand_avx512(
              next, slots + count, {bits_of(row), bits_of(row + 1)}, columns,
              {out + packed.order[row] * columns, row + 1 < end ? out + packed.order[row + 1] * columns : nullptr});
        }
        return next != nullptr;
      }
    }
#endif
    for (int64_t row = first; row < end; ++row) std::fill_n(weight + packed.order[row] * columns, columns, T{});
    return for_each_value(
        tile, [&](int64_t row, int64_t column, T value) { weight[packed.order[row] * columns + column] = value; });
  }

  // Calls f(row, column, value) for each value of a tile.
  template <class F>
  bool for_each_value(int64_t tile, const F& f) const {
    const int64_t first = tile * packed_rows::kTileRows, end = std::min(rows, first + packed_rows::kTileRows);
    const Slot* next = slots + packed.starts[tile];
    for (int64_t row = first; row < end; row += kSlotValues<T>) {
      const Slot* longest = next;
      for (int lane = 0; lane < kSlotValues<T> && row + lane < end; ++lane) {
        const T* value = reinterpret_cast<const T*>(next) + lane;
        const uint64_t* bits = bits_of(row + lane);
        for (int64_t word = 0; word < words; ++word) {
          if (reinterpret_cast<const Slot*>(value - lane) > slots + count) return false;
          for (uint64_t left = bits[word]; left != 0; left &= left - 1) {
            const int64_t column = word * packed_rows::kWordColumns + __builtin_ctzll(left);
            if (column >= columns) return false;
            f(row + lane, column, *value);
            value += kSlotValues<T>;
          }
        }
        longest = std::max(longest, reinterpret_cast<const Slot*>(value - lane));
      }
      next = longest;
    }
    return true;
  }
};

// Throws if `starts` or `order` would lead a kernel outside the tensors. The bits are checked while they are followed.
inline void check_places(const BitmaskRows& packed, DType dtype) {
  const int64_t tiles = packed_rows::tiles(packed.rows),
                slots = packed.value_count / packed_rows::lanes(size_of(dtype)) - packed_rows::kSlack;
  for (int64_t tile = 0; tile <= tiles; ++tile) {
    if (packed.starts[tile] < (tile == 0 ? 0 : packed.starts[tile - 1]) || packed.starts[tile] > slots) {
      throw std::invalid_argument(
          "starts: expected ascending offsets of at most " + std::to_string(slots) + " slots, got " +
          std::to_string(packed.starts[tile]));
    }
  }
  bool inside = true;
  for (int64_t i = 0; i < packed.rows; ++i) inside &= static_cast<uint32_t>(packed.order[i]) < static_cast<uint64_t>(packed.rows);
  if (inside) return;
  const int32_t* outside =
      std::find_if(packed.order, packed.order + packed.rows, [&](int32_t row) { return row < 0 || row >= packed.rows; });
  throw std::invalid_argument(
      "order: expected rows from 0 to " + std::to_string(packed.rows - 1) + ", got " + std::to_string(*outside));
}

inline void check_bits(bool sound) {
  if (!sound) throw std::invalid_argument("bitmask: expected no more set bits than there are values");
}

}  // namespace sparsekern::cpu
