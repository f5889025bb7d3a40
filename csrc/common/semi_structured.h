// The 2:4 layout of PyTorch's semi-structured tensors (CUTLASS), for host and device. Its Python mirror,
// sparsekern/layouts/semi_structured.py, defines groups, codes and words.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace sparsekern::semi_structured {

// Element types that have a layout.
enum class Type { i8, bf16, f16, f32 };

// The layout of a weight with elements of `element_size` bytes; half the columns of each group are kept.
struct Format {
  int group;         // columns of a group: 4, or 2 for float32
  int word_bits;     // bits of a metadata word: 16, or 32 for int8 weights
  int row_multiple;  // rows of a block, within which words are permuted

  SPARSEKERN_HOST_DEVICE constexpr int codes_per_word() const { return word_bits / 4; }
  SPARSEKERN_HOST_DEVICE constexpr int columns_per_word() const { return group * codes_per_word(); }
  // Words are permuted in pairs along a row.
  SPARSEKERN_HOST_DEVICE constexpr int column_multiple() const { return 2 * columns_per_word(); }
};

SPARSEKERN_HOST_DEVICE constexpr Format format_of(int element_size) {
  return element_size == 1 ? Format{4, 32, 16} : element_size == 2 ? Format{4, 16, 32} : Format{2, 16, 32};
}

// Returns the code of a group from its four non-zero flags (bit j for column j; a float32 stands for two equal flags). The two
// positions ascend. A group with fewer than two non-zeros also stores zeros.
SPARSEKERN_HOST_DEVICE constexpr unsigned code_of(unsigned flags) {
  const bool a = (flags & 1) != 0;
  const bool b = (flags & 2) != 0;
  const bool d = (flags & 8) != 0;
  const unsigned first = a ? 0 : b ? 1 : 2;
  const unsigned second = a && b ? 1 : d || first == 2 ? 3 : 2;
  return first | second << 2;
}

SPARSEKERN_HOST_DEVICE constexpr unsigned first_position(unsigned code) { return code & 3; }
SPARSEKERN_HOST_DEVICE constexpr unsigned second_position(unsigned code) { return code >> 2; }

// Returns whether packing can write `code` for groups of `group` columns.
SPARSEKERN_HOST_DEVICE constexpr bool is_code(unsigned code, int group) {
  if (group == 2) return code == code_of(0b0011) || code == code_of(0b1100);
  return first_position(code) < second_position(code);
}

// Returns a bit set of the codes that packing can write.
SPARSEKERN_HOST_DEVICE constexpr unsigned valid_codes(int group) {
  unsigned valid = 0;
  for (unsigned code = 0; code < 16; ++code) valid |= static_cast<unsigned>(is_code(code, group)) << code;
  return valid;
}

// Returns the offset of the metadata word of (row, column), in words. Rows are spread within their block, 2 x 2 blocks of words are
// transposed, and pairs of columns are stored one after another.
SPARSEKERN_HOST_DEVICE constexpr int64_t word_offset(int64_t row, int64_t column, int64_t rows, int row_multiple) {
  const int64_t spread = row / row_multiple * row_multiple + row % 8 * (row_multiple / 8) + row % row_multiple / 8;
  return column / 2 * 2 * rows + (spread / 2 * 2 + column % 2) * 2 + spread % 2;
}

// Words of a row visited at a time. The stored words of one row are 4 * rows bytes or more apart, at distances that share cache
// sets. This many columns of a block of rows stay in a cache while the block is visited row by row.
constexpr int64_t kTileWords = 64;

}  // namespace sparsekern::semi_structured
