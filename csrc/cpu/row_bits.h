// The non-zeros of a row as bits, one per weight: the first step of bitmask_pack and nm_pack.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/packed_rows.h"
#include "cpu/isa.h"

namespace sparsekern::cpu {

// Returns the bits of an element without its sign; both zeros give 0.
template <class Bits>
constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;

// Writes words(columns) words, bit j of a word for its column j; bits past the last column are zero. Returns the number of set
// bits.
template <class Bits>
SPARSEKERN_INLINE int64_t mark_row(const Bits* row, int64_t columns, uint64_t* words) {
  int64_t set = 0;
  for (int64_t first = 0; first < columns; first += packed_rows::kWordColumns) {
    const int64_t length = std::min(packed_rows::kWordColumns, columns - first);
    uint8_t flags[packed_rows::kWordColumns] = {};
    if (length == packed_rows::kWordColumns) {
      for (int64_t j = 0; j < packed_rows::kWordColumns; ++j) flags[j] = (row[first + j] & kMagnitude<Bits>) != 0;
    } else {
      for (int64_t j = 0; j < length; ++j) flags[j] = (row[first + j] & kMagnitude<Bits>) != 0;
    }
    uint64_t word = 0;
    for (int byte = 0; byte < 8; ++byte) {
      uint64_t eight;
      std::memcpy(&eight, flags + 8 * byte, sizeof eight);
      // The product collects the lowest bit of each of the eight bytes in the top byte; the first byte's bit is the lowest.
      word |= (eight * 0x0102040810204080u >> 56) << (8 * byte);
    }
    *words++ = word;
    set += __builtin_popcountll(word);
  }
  return set;
}

}  // namespace sparsekern::cpu
