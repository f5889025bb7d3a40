// Packed blocks of N:M weights with 4-bit values as arguments of kernels.
#pragma once

#include "cpu/packed_tensors.h"

namespace sparsekern::cpu {

inline nm_q4::Layout nm_q4_layout(int64_t n, int64_t m) {
  check(nm_q4::has_layout(n, m), "n, m: expected 2:4, 1:4 or 4:16");
  return {n, m};
}

struct NmQ4Tensors {
  Tensor blocks;
  NmQ4Rows rows;

  NmQ4Tensors(const Tensor& blocks_, int64_t n, int64_t m, int64_t out_features, int64_t columns) : blocks(dense(blocks_)), rows{} {
    const nm_q4::Layout layout = nm_q4_layout(n, m);
    check(out_features >= 0 && columns >= 0 && columns % m == 0, "n, m: expected columns divisible by m");
    check(
        blocks.scalar_type() == ScalarType::Byte && blocks.dim() == 3 && blocks.size(0) == layout.strips(out_features) &&
            blocks.size(1) == nm_q4::blocks(columns) && blocks.size(2) == layout.bytes(),
        "blocks: expected uint8 [strips, ceil(columns / 64), bytes of a block]");
    rows = {data_of<uint8_t>(blocks), out_features, layout};
  }
};

}  // namespace sparsekern::cpu
