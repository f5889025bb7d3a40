// nm_q4_unpack: the dense weight and the scales of blocks that nm_q4_pack made, which are checked.
//
// Floor: one read of the blocks and one write of the weight. Each value is checked and stored one by one: this is a step of loading a
// model, which takes longer to read.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/nm_q4_multiply.h"

namespace sparsekern::cpu {

namespace {

using nm_q4::kColumns;
using nm_q4::Layout;
using nm_q4_multiply::bits_at;
using nm_q4_multiply::scale_of;

struct Blocks {
  const NmQ4Rows& packed;
  int64_t columns;
  int64_t across = nm_q4::blocks(columns);

  const Layout& layout() const { return packed.layout; }
  int64_t rows() const { return layout().strips(packed.rows) * layout().rows(); }  // with those that fill the last strip
  int64_t own(int64_t row) const { return row % layout().rows(); }
  const uint8_t* block(int64_t row, int64_t index) const {
    return packed.blocks + (row / layout().rows() * across + index) * layout().bytes();
  }
  float scale(int64_t row, int64_t index) const { return scale_of(block(row, index), layout(), own(row)); }

  // Value `stored` of a group of a row, which has n of them in every m columns, with those that fill the last block.
  struct Group {
    const uint8_t* block;
    int64_t row, quarter, k, column;
  };
  Group group(int64_t row, int64_t index) const {
    const int64_t a_quarter = nm_q4::kQuarterColumns / layout().m, in_block = index % (nm_q4::kQuarters * a_quarter);
    const int64_t b = index / (nm_q4::kQuarters * a_quarter);
    return {block(row, b), own(row), in_block / a_quarter, in_block % a_quarter * layout().n, index * layout().m};
  }
  int64_t groups() const { return across * kColumns / layout().m; }
  int64_t position(const Group& group, int64_t stored) const {
    return bits_at(group.block, layout().position(group.row, group.quarter, group.k + stored), layout().position_mask());
  }
  int64_t value(const Group& group, int64_t stored) const {
    return bits_at(group.block, layout().value(group.row, group.quarter, group.k + stored), 15) - nm_q4::kZero;
  }
  bool ascends(const Group& group) const {
    for (int64_t i = 1; i < layout().n; ++i) {
      if (position(group, i) <= position(group, i - 1)) return false;
    }
    return true;
  }
  bool is_zero(const Group& group) const {
    for (int64_t i = 0; i < layout().n; ++i) {
      if (value(group, i) != 0) return false;
    }
    return true;
  }
};

// Returns whether packing could have made the row; writes it, unless it fills a strip.
SPARSEKERN_INLINE bool unpack_row(const Blocks& blocks, int64_t row, float* all_weights, Half* all_scales) {
  const bool given = row < blocks.packed.rows;
  float* weight = given ? all_weights + row * blocks.columns : nullptr;
  Half* scales = given ? all_scales + row * blocks.across : nullptr;
  for (int64_t b = 0; b < blocks.across; ++b) {
    const float scale = blocks.scale(row, b);
    if (!std::isfinite(scale) || (!given && float_to_bits(scale) != 0)) return false;
    if (given) scales[b] = from_float<Half>(scale);
  }
  if (given) std::fill_n(weight, blocks.columns, 0.0f);
  for (int64_t index = 0; index < blocks.groups(); ++index) {
    const Blocks::Group group = blocks.group(row, index);
    if (!blocks.ascends(group)) return false;
    if (!given || group.column >= blocks.columns) {
      if (!blocks.is_zero(group)) return false;
      continue;
    }
    const float scale = blocks.scale(row, group.column / kColumns);
    for (int64_t i = 0; i < blocks.layout().n; ++i) {
      const int64_t value = blocks.value(group, i);  // a zero of a negative scale is no -0.0
      weight[group.column + blocks.position(group, i)] = value == 0 ? 0.0f : scale * static_cast<float>(value);
    }
  }
  return true;
}

// Throws for the first kind of fault that the reference names.
[[noreturn]] void refuse(const Blocks& blocks) {
  const Layout& layout = blocks.layout();
  for (int64_t row = 0; row < blocks.rows(); ++row) {
    for (int64_t b = 0; b < blocks.across; ++b) {
      const float scale = blocks.scale(row, b);
      if (std::isfinite(scale)) continue;
      throw std::invalid_argument(
          "blocks: expected finite scales, got " +
          std::string(
              std::isnan(scale) ? "nan"
              : scale < 0       ? "-inf"
                                : "inf") +
          " in row " + std::to_string(row) + ", block " + std::to_string(b));
    }
  }
  for (int64_t row = 0; row < blocks.rows(); ++row) {
    for (int64_t index = 0; index < blocks.groups(); ++index) {
      const Blocks::Group group = blocks.group(row, index);
      if (blocks.ascends(group)) continue;
      std::string found;
      for (int64_t i = 0; i < layout.n; ++i) found += (i > 0 ? ", " : "") + std::to_string(blocks.position(group, i));
      throw std::invalid_argument(
          "blocks: expected " + std::to_string(layout.n) + " ascending positions in every group, got [" + found + "] in row " +
          std::to_string(row) + ", group " + std::to_string(index));
    }
  }
  for (int64_t row = 0; row < blocks.packed.rows; ++row) {
    for (int64_t index = blocks.columns / layout.m; index < blocks.groups(); ++index) {
      if (blocks.is_zero(blocks.group(row, index))) continue;
      throw std::invalid_argument(
          "blocks: expected zeros after the " + std::to_string(blocks.columns) + " columns, got another value in row " +
          std::to_string(row));
    }
  }
  throw std::invalid_argument("blocks: expected zeros after the " + std::to_string(blocks.packed.rows) + " rows");
}

}  // namespace

void nm_q4_unpack(const NmQ4Rows& packed, int64_t columns, float* weight, void* scales, const Executor& executor) {
  const Blocks blocks{packed, columns};
  const auto unpack_one_row = Entries<&unpack_row>::choose();
  std::atomic<bool> sound{true};
  parallel_for(executor, blocks.rows(), 1 + 16384 / (columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!unpack_one_row(blocks, row, weight, static_cast<Half*>(scales))) sound = false;
    }
  });
  if (!sound) refuse(blocks);
}

}  // namespace sparsekern::cpu
