// bitmask_unpack: unpacks a weight that bitmask_pack packed.
//
// Floor: one read of the values and bits and one write of the weight. The bits, a sixteenth of the bytes of a 16-bit weight, are
// counted first. Everything that they imply is compared with the other tensors before a value is read. Tiles are then expanded as
// in bitmask_linear for many tokens.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/packed_rows.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace sparsekern::cpu {

namespace {

SPARSEKERN_INLINE int64_t count_bits(const uint64_t* words, int64_t count) {
  int64_t set = 0;
  for (int64_t i = 0; i < count; ++i) set += __builtin_popcountll(words[i]);
  return set;
}

// Counts the bits of each row. Throws if a bit is set past the last column.
std::vector<int64_t> counts_of(const BitmaskRows& packed, int64_t columns, const Executor& executor) {
  const int64_t words = packed_rows::words(columns), left_out = words * packed_rows::kWordColumns - columns;
  const auto count = Entries<&count_bits>::choose();
  const auto is_stray = [&](int64_t row) {
    return left_out != 0 && packed.bits[(row + 1) * words - 1] >> (packed_rows::kWordColumns - left_out) != 0;
  };
  std::vector<int64_t> counts(static_cast<size_t>(packed.rows));
  std::atomic<bool> stray{false};
  parallel_for(executor, packed.rows, 1 + 16384 / (words + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      counts[row] = count(packed.bits + row * words, words);
      if (is_stray(row)) stray = true;
    }
  });
  if (stray) {
    int64_t row = 0;
    while (!is_stray(row)) ++row;
    throw std::invalid_argument(
        "bitmask: expected zeros past column " + std::to_string(columns - 1) + ", got a set bit in row " + std::to_string(row));
  }
  return counts;
}

void check_starts(const BitmaskRows& packed, const std::vector<int64_t>& counts, int64_t lanes) {
  int64_t slots = 0, longest = 0, wrong = -1;
  for (int64_t row = 0; row <= packed.rows; ++row) {
    if (row % lanes == 0 || row == packed.rows) slots += std::exchange(longest, 0);
    if (row % packed_rows::kTileRows == 0 || row == packed.rows) {
      const int64_t tile = packed_rows::tiles(row);
      if (packed.starts[tile] != slots && wrong < 0) wrong = tile;
    }
    if (row < packed.rows) longest = std::max(longest, counts[row]);
  }
  const int64_t expected = (slots + packed_rows::kSlack) * lanes;
  if (packed.value_count != expected) {
    throw std::invalid_argument(
        "values: expected " + std::to_string(expected) + " values for the bits set in bitmask, got " +
        std::to_string(packed.value_count));
  }
  if (wrong >= 0) {
    throw std::invalid_argument(
        "starts: expected the first slot after the values of earlier tiles, got " + std::to_string(packed.starts[wrong]) +
        " for tile " + std::to_string(wrong));
  }
}

void check_order(const BitmaskRows& packed) {
  std::vector<bool> found(static_cast<size_t>(packed.rows));
  for (int64_t i = 0; i < packed.rows; ++i) {
    const int32_t row = packed.order[i];
    if (row < 0 || row >= packed.rows || found[row]) {
      throw std::invalid_argument("order: expected each row from 0 to " + std::to_string(packed.rows - 1) + " once");
    }
    found[row] = true;
  }
}

}  // namespace

void bitmask_unpack(const BitmaskRows& packed, DType dtype, int64_t columns, void* weight, const Executor& executor) {
  check_starts(packed, counts_of(packed, columns, executor), packed_rows::lanes(size_of(dtype)));
  check_order(packed);
  bitmask_expand(packed, dtype, columns, weight, executor);
}

}  // namespace sparsekern::cpu
