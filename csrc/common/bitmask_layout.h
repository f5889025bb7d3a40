// The bitmask of bitmask_pack: bit `column % 8`, counted from the lowest, of byte `column / 8` of a row; padding bits are zero.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace sparsekern::bitmask {

constexpr int64_t kBitsPerByte = 8;

SPARSEKERN_HOST_DEVICE constexpr int64_t bytes_per_row(int64_t columns) { return (columns + kBitsPerByte - 1) / kBitsPerByte; }

// The bits of a row's last byte that stand for no column.
SPARSEKERN_HOST_DEVICE constexpr uint8_t padding_bits(int64_t columns) {
  const int64_t used = columns % kBitsPerByte;
  return used == 0 ? 0 : static_cast<uint8_t>(0xff << used);
}

}  // namespace sparsekern::bitmask
