// nm_pack: packs the kept values of an N:M weight and their positions (common/packed_rows.h).
//
// Floor: one read of the weight and one write of its values and codes, rows * columns * (2 + 2 n/m + code bits / 8 * n/m) bytes for
// 16-bit values. A row is marked in vectors, one bit per weight. The bits of a group give the stored positions; 2:4 uses a table of
// 16. Values are collected in column order in a buffer that stays in L1, and then moved to their slots in vectors.
#include <algorithm>
#include <array>
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

// The scratch memory of a thread.
template <class Bits>
struct Buffers {
  std::vector<uint64_t> words;     // the bits of a row, and a word of zeros to read past them
  std::vector<Bits> values;        // values of a row in column order, and zeros to fill its last block
  std::vector<uint8_t> positions;  // positions of a row, likewise

  explicit Buffers(const NmShape& shape)
      : words(static_cast<size_t>(packed_rows::words(shape.columns) + 1)),
        values(static_cast<size_t>(shape.stored)),
        positions(static_cast<size_t>(shape.stored)) {}
};

// Returns the stored positions of a group as bits: its non-zeros and, if there are fewer than n, the first of its zeros.
constexpr unsigned stored_positions(unsigned flags, int count, int64_t n) {
  for (; count < n; ++count) flags |= flags + 1;
  return flags;
}

template <class Bits>
SPARSEKERN_INLINE Bits without_sign_of_zero(Bits value) {
  return (value & kMagnitude<Bits>) == 0 ? Bits{0} : value;
}

// Returns the two positions of a 2:4 group for each set of four flags, two bits each.
constexpr std::array<uint8_t, 16> make_pairs() {
  std::array<uint8_t, 16> pairs{};
  for (unsigned flags = 0; flags < 16; ++flags) {
    unsigned left = stored_positions(flags, __builtin_popcount(flags), 2);
    const auto first = static_cast<unsigned>(__builtin_ctz(left));
    left &= left - 1;
    pairs[flags] = static_cast<uint8_t>(first | static_cast<unsigned>(__builtin_ctz(left)) << 2);
  }
  return pairs;
}
constexpr std::array<uint8_t, 16> kPairs = make_pairs();

// Both functions collect the values and positions of a row and return whether every group fits.
template <class Bits>
SPARSEKERN_INLINE bool collect_pairs(const Bits* row, const NmShape& shape, Buffers<Bits>* buffers) {
  unsigned too_many = 0;
  Bits* values = buffers->values.data();
  uint8_t* positions = buffers->positions.data();
  for (int64_t column = 0; column < shape.columns; column += 4) {
    const unsigned flags = buffers->words[column / packed_rows::kWordColumns] >> column % packed_rows::kWordColumns & 15u;
    const unsigned pair = kPairs[flags], first = pair & 3, second = pair >> 2;
    too_many |= 0xe880u >> flags;  // bit `flags` is set for three or four non-zeros
    *values++ = without_sign_of_zero(row[column + first]);
    *values++ = without_sign_of_zero(row[column + second]);
    *positions++ = static_cast<uint8_t>(first);
    *positions++ = static_cast<uint8_t>(second);
  }
  return (too_many & 1u) == 0;
}

template <class Bits>
SPARSEKERN_INLINE bool collect_any(const Bits* row, const NmShape& shape, Buffers<Bits>* buffers) {
  bool fits = true;
  Bits* values = buffers->values.data();
  uint8_t* positions = buffers->positions.data();
  const auto* bytes = reinterpret_cast<const char*>(buffers->words.data());
  const unsigned group = (1u << shape.m) - 1;
  for (int64_t column = 0; column < shape.columns; column += shape.m) {
    uint32_t some;
    std::memcpy(&some, bytes + column / 8, sizeof some);
    const unsigned flags = some >> column % 8 & group;
    const int count = __builtin_popcount(flags);
    fits &= count <= shape.n;
    unsigned left = stored_positions(flags, count, shape.n);
    for (int64_t i = 0; i < shape.n; ++i, left &= left - 1) {
      const int position = __builtin_ctz(left);
      *values++ = without_sign_of_zero(row[column + position]);
      *positions++ = static_cast<uint8_t>(position);
    }
  }
  return fits;
}

// Moves the values of a row to their slots, where 16-bit values of the two halves of a block are stored side by side.
template <class Bits>
SPARSEKERN_INLINE void write_values(const Bits* from, int64_t stored, Bits* values) {
  if constexpr (sizeof(Bits) == 4) {
    std::copy_n(from, stored, values);
  } else {
    for (int64_t first = 0; first < stored; first += 2 * kBlockSlots) {
      uint32_t slots[kBlockSlots];
      for (int64_t d = 0; d < kBlockSlots; ++d) {
        slots[d] = from[first + d] | static_cast<uint32_t>(from[first + kBlockSlots + d]) << 16;
      }
      std::memcpy(values + first, slots, sizeof slots);
    }
  }
}

template <int kBits>
SPARSEKERN_INLINE void write_codes(const uint8_t* positions, int64_t stored, uint32_t* codes) {
  for (int64_t first = 0; first < stored; first += 32 / kBits) {
    uint32_t word = 0;
    for (int i = 0; i < 32 / kBits; ++i) word |= static_cast<uint32_t>(positions[first + i]) << (kBits * i);
    *codes++ = word;
  }
}

template <class Bits>
SPARSEKERN_INLINE bool pack_row(const Bits* row, const NmShape& shape, Buffers<Bits>* buffers, Bits* values, uint32_t* codes) {
  mark_row(row, shape.columns, buffers->words.data());
  const bool fits = shape.n == 2 && shape.m == 4 ? collect_pairs(row, shape, buffers) : collect_any(row, shape, buffers);
  write_values(buffers->values.data(), shape.stored, values);
  if (packed_rows::code_bits(shape.m) == 2) {
    write_codes<2>(buffers->positions.data(), shape.stored, codes);
  } else {
    write_codes<4>(buffers->positions.data(), shape.stored, codes);
  }
  return fits;
}

// Throws for the first group that does not fit.
template <class Bits>
void refuse(const Bits* weight, int64_t rows, const NmShape& shape) {
  for (int64_t i = 0; i < rows * shape.columns; i += shape.m) {
    int64_t count = 0;
    for (int64_t j = 0; j < shape.m; ++j) count += (weight[i + j] & kMagnitude<Bits>) != 0;
    if (count <= shape.n) continue;
    const int64_t column = i % shape.columns;
    throw std::invalid_argument(
        "weight: expected at most " + std::to_string(shape.n) + " non-zeros in every " + std::to_string(shape.m) + " inputs, got " +
        std::to_string(count) + " in row " + std::to_string(i / shape.columns) + ", columns " + std::to_string(column) + " to " +
        std::to_string(column + shape.m - 1));
  }
}

template <class Bits>
void pack(const Bits* weight, int64_t rows, const NmShape& shape, Bits* values, uint32_t* codes, const Executor& executor) {
  const auto pack_one_row = Entries<&pack_row<Bits>>::choose();
  std::atomic<bool> fits{true};
  parallel_for(executor, rows, 1 + 16384 / (shape.columns + 1), [&](int64_t begin, int64_t end) {
    Buffers<Bits> buffers(shape);
    for (int64_t row = begin; row < end; ++row) {
      const bool row_fits =
          pack_one_row(weight + row * shape.columns, shape, &buffers, values + row * shape.stored, codes + row * shape.codes());
      if (!row_fits) fits = false;
    }
  });
  if (!fits) refuse(weight, rows, shape);
}

}  // namespace

void nm_pack(
    const void* weight, DType dtype, int64_t rows, int64_t columns, int64_t n, int64_t m, void* values, uint32_t* codes,
    const Executor& executor) {
  const NmShape shape(columns, n, m, size_of(dtype));
  if (size_of(dtype) == 4) {
    pack(static_cast<const uint32_t*>(weight), rows, shape, static_cast<uint32_t*>(values), codes, executor);
  } else {
    pack(static_cast<const uint16_t*>(weight), rows, shape, static_cast<uint16_t*>(values), codes, executor);
  }
}

}  // namespace sparsekern::cpu
