// nm_unpack: unpacks a weight that nm_pack packed.
//
// Floor: one read of the values and codes and one write of the weight. A row's positions and values are brought into column order
// in vectors, in buffers that stay in L1. Each value is then stored at its column in a row of zeros.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/nm_shape.h"
#include "cpu/row_bits.h"

namespace sparsekern::cpu {

namespace {

using packed_rows::kBlockSlots;

template <int kBits>
SPARSEKERN_INLINE void read_codes(const uint32_t* codes, int64_t stored, uint8_t* positions) {
  for (int64_t first = 0; first < stored; first += 32 / kBits) {
    const uint32_t word = *codes++;
    for (int i = 0; i < 32 / kBits; ++i) positions[first + i] = static_cast<uint8_t>(word >> (kBits * i) & ((1u << kBits) - 1));
  }
}

SPARSEKERN_INLINE void read_positions(const uint32_t* codes, const NmShape& shape, uint8_t* positions) {
  if (packed_rows::code_bits(shape.m) == 2) {
    read_codes<2>(codes, shape.stored, positions);
  } else {
    read_codes<4>(codes, shape.stored, positions);
  }
}

// Writes the values of a row to `values`, in column order.
template <class Bits>
SPARSEKERN_INLINE void read_values(const Bits* from, int64_t stored, Bits* values) {
  constexpr int64_t lanes = packed_rows::lanes(sizeof(Bits));
  for (int64_t first = 0; first < stored; first += lanes * kBlockSlots) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      for (int64_t d = 0; d < kBlockSlots; ++d) values[first + lane * kBlockSlots + d] = from[first + d * lanes + lane];
    }
  }
}

// Returns whether the padding of the last block is zero.
template <class Bits>
SPARSEKERN_INLINE bool fill_is_zero(const Bits* values, const uint8_t* positions, const NmShape& shape) {
  unsigned fill = 0;
  for (int64_t k = shape.kept(); k < shape.stored; ++k) fill |= positions[k] | ((values[k] & kMagnitude<Bits>) != 0);
  return fill == 0;
}

// Returns whether packing could have made the row; `weight` is then its dense form.
template <class Bits>
SPARSEKERN_INLINE bool unpack_row(
    const Bits* stored_values, const uint32_t* codes, const NmShape& shape, Bits* values, uint8_t* positions, Bits* weight) {
  read_positions(codes, shape, positions);
  read_values(stored_values, shape.stored, values);
  if (!fill_is_zero(values, positions, shape)) return false;
  std::fill_n(weight, shape.columns, Bits{0});
  if (shape.n == 2 && shape.m == 4) {
    unsigned sound = 1;
    for (int64_t k = 0, column = 0; column < shape.columns; column += 4, k += 2) {
      const unsigned first = positions[k] & 3, second = positions[k + 1] & 3;
      sound &= first < second;
      weight[column + first] = values[k];
      weight[column + second] = values[k + 1];
    }
    return sound != 0;
  }
  for (int64_t k = 0, column = 0; column < shape.columns; column += shape.m) {
    for (int64_t i = 0, last = -1; i < shape.n; ++i, ++k) {
      const int64_t position = positions[k];
      if (position <= last || position >= shape.m) return false;
      weight[column + position] = values[k];
      last = position;
    }
  }
  return true;
}

[[noreturn]] void refuse_positions(const uint8_t* positions, const NmShape& shape, int64_t row, int64_t group) {
  std::string found;
  for (int64_t i = 0; i < shape.n; ++i) {
    if (i > 0) found += ", ";
    found += std::to_string(positions[group * shape.n + i]);
  }
  throw std::invalid_argument(
      "codes: expected " + std::to_string(shape.n) + " ascending positions below " + std::to_string(shape.m) +
      " in every group, got [" + found + "] in row " + std::to_string(row) + ", group " + std::to_string(group));
}

// Throws for the first kind of fault that the reference names.
template <class Bits>
void refuse(const Bits* values, const uint32_t* codes, int64_t rows, const NmShape& shape) {
  std::vector<uint8_t> positions(static_cast<size_t>(shape.stored));
  std::vector<Bits> ordered(positions.size());
  const std::string kept = std::to_string(shape.kept());
  for (int64_t row = 0; row < rows; ++row) {
    read_positions(codes + row * shape.codes(), shape, positions.data());
    if (std::any_of(positions.begin() + shape.kept(), positions.end(), [](uint8_t position) { return position != 0; })) {
      throw std::invalid_argument("codes: expected zeros after the " + kept + " positions of a row");
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    read_values(values + row * shape.stored, shape.stored, ordered.data());
    if (std::any_of(ordered.begin() + shape.kept(), ordered.end(), [](Bits value) { return (value & kMagnitude<Bits>) != 0; })) {
      throw std::invalid_argument("values: expected zeros after the " + kept + " values of a row");
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    read_positions(codes + row * shape.codes(), shape, positions.data());
    for (int64_t group = 0; group < shape.columns / shape.m; ++group) {
      int64_t last = -1;
      for (int64_t i = 0; i < shape.n; ++i) {
        const int64_t position = positions[group * shape.n + i];
        if (position <= last || position >= shape.m) refuse_positions(positions.data(), shape, row, group);
        last = position;
      }
    }
  }
}

template <class Bits>
void unpack(const NmRows& packed, const NmShape& shape, Bits* weight, const Executor& executor) {
  const auto unpack_one_row = Entries<&unpack_row<Bits>>::choose();
  const auto* stored = static_cast<const Bits*>(packed.values);
  std::atomic<bool> sound{true};
  parallel_for(executor, packed.rows, 1 + 16384 / (shape.columns + 1), [&](int64_t begin, int64_t end) {
    std::vector<Bits> values(static_cast<size_t>(shape.stored));
    std::vector<uint8_t> positions(values.size());
    for (int64_t row = begin; row < end; ++row) {
      const bool row_is_sound = unpack_one_row(
          stored + row * shape.stored, packed.codes + row * shape.codes(), shape, values.data(), positions.data(),
          weight + row * shape.columns);
      if (!row_is_sound) sound = false;
    }
  });
  if (!sound) refuse(stored, packed.codes, packed.rows, shape);
}

}  // namespace

void nm_unpack(const NmRows& packed, DType dtype, int64_t columns, void* weight, const Executor& executor) {
  const NmShape shape(columns, packed.n, packed.m, size_of(dtype));
  if (size_of(dtype) == 4) {
    unpack(packed, shape, static_cast<uint32_t*>(weight), executor);
  } else {
    unpack(packed, shape, static_cast<uint16_t*>(weight), executor);
  }
}

}  // namespace sparsekern::cpu
