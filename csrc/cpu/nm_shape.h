// Sizes of a packed N:M weight (common/packed_rows.h).
#pragma once

#include <cstdint>

#include "common/packed_rows.h"

namespace sparsekern::cpu {

struct NmShape {
  int64_t columns, n, m;
  int64_t stored;  // values per row, including the padding of its last block

  NmShape(int64_t columns_, int64_t n_, int64_t m_, int64_t element_size)
      : columns(columns_), n(n_), m(m_), stored(packed_rows::stored_per_row(columns_, n_, m_, element_size)) {}

  int64_t kept() const { return columns / m * n; }                           // values per row, without padding
  int64_t codes() const { return stored * packed_rows::code_bits(m) / 32; }  // words per row
};

}  // namespace sparsekern::cpu
