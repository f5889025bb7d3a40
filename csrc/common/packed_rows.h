// Layouts of packed weights for `bitmask_linear` and `nm_linear`. Their Python mirror, sparsekern/layouts/packed_rows.py, defines
// rows, groups, slots and blocks.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace sparsekern::packed_rows {

using Slot = uint32_t;  // one float, or two 16-bit values for two accumulators, the first in the low half

constexpr int64_t kWordColumns = 64;  // columns of a word of bits
constexpr int64_t kTileRows = 16;
constexpr int64_t kSlack =
    64;  // slots after the last value: as many as a word of bits can advance, so that vector reads need no bounds check
constexpr int64_t kBlockSlots = 16;  // slots of a block of N:M values
constexpr int64_t kMostM = 16;

SPARSEKERN_HOST_DEVICE constexpr int64_t lanes(int64_t element_size) { return 4 / element_size; }
SPARSEKERN_HOST_DEVICE constexpr int64_t words(int64_t columns) { return (columns + kWordColumns - 1) / kWordColumns; }
SPARSEKERN_HOST_DEVICE constexpr int64_t tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

SPARSEKERN_HOST_DEVICE constexpr int64_t code_bits(int64_t m) { return m <= 4 ? 2 : 4; }

// Values stored for a row of N:M, including the padding of its last block.
SPARSEKERN_HOST_DEVICE constexpr int64_t stored_per_row(int64_t columns, int64_t n, int64_t m, int64_t element_size) {
  const int64_t block = kBlockSlots * lanes(element_size);
  return (columns / m * n + block - 1) / block * block;
}

// Position of value `k` in a stored row of N:M, in values.
SPARSEKERN_HOST_DEVICE constexpr int64_t place_of(int64_t k, int64_t element_size) {
  const int64_t group = lanes(element_size);
  const int64_t block = kBlockSlots * group;
  return k / block * block + k % kBlockSlots * group + k % block / kBlockSlots;
}

}  // namespace sparsekern::packed_rows
