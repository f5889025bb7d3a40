// bitmask_pack: the non-zeros of a weight and one bit a weight (common/bitmask_layout.h).
//
// Floor: two reads of the weight (the number of values is known only after the first), one write of the values. The first pass
// writes the bitmask and counts each row; the counts become each row's place among the values; the second pass moves them there.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/bitmask_layout.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/load_keys.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kWordBits = 64;

// Writes the bits of a row. Returns how many are set, or -1 where a weight is NaN.
template <class T>
SPARSEKERN_INLINE int64_t mark_row(const T* weight, int64_t columns, uint8_t* bits) {
  int64_t set = 0;
  int32_t highest = 0;
  for (int64_t first = 0; first < columns; first += kWordBits) {
    const int64_t length = std::min(kWordBits, columns - first);
    uint8_t flags[kWordBits] = {};
    for (int64_t j = 0; j < length; ++j) {
      const int32_t magnitude = signed_bits(weight[first + j]) & magnitude_bits(T{});
      highest = magnitude > highest ? magnitude : highest;
      flags[j] = magnitude != 0;
    }
    uint64_t word = 0;
    for (int64_t byte = 0; byte < kWordBits / 8; ++byte) {
      uint64_t eight;
      std::memcpy(&eight, flags + 8 * byte, sizeof eight);
      // The product brings the lowest bit of each of the eight bytes together in the top byte, the first byte's lowest.
      word |= (eight * 0x0102040810204080u >> 56) << (8 * byte);
    }
    std::memcpy(bits + first / 8, &word, static_cast<size_t>(bitmask::bytes_per_row(length)));
    set += __builtin_popcountll(word);
  }
  return highest > infinity_bits(T{}) ? -1 : set;
}

// Moves the weights whose bit is set to `values`. AVX-512's compress was measured to be no faster: this is bound by memory.
template <class Bits>
SPARSEKERN_INLINE void gather_row(const Bits* weight, int64_t columns, const uint8_t* bits, Bits* values) {
  for (int64_t first = 0; first < columns; first += kWordBits) {
    uint64_t word = 0;
    std::memcpy(&word, bits + first / 8, static_cast<size_t>(bitmask::bytes_per_row(std::min(kWordBits, columns - first))));
    for (; word != 0; word &= word - 1) *values++ = weight[first + __builtin_ctzll(word)];
  }
}

template <class Bits>
void gather(
    const void* weight, int64_t rows, int64_t columns, const uint8_t* bits, const int64_t* row_start, void* values,
    const Executor& executor) {
  const auto gather_one_row = Entries<&gather_row<Bits>>::choose();
  parallel_for(executor, rows, 1 + 16384 / (columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      gather_one_row(
          static_cast<const Bits*>(weight) + row * columns, columns, bits + row * bitmask::bytes_per_row(columns),
          static_cast<Bits*>(values) + row_start[row]);
    }
  });
}

}  // namespace

int64_t bitmask_mark(
    const void* weight, DType dtype, int64_t rows, int64_t columns, uint8_t* bits, int64_t* row_start, const Executor& executor) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* elements = static_cast<const T*>(weight);
    const auto mark = Entries<&mark_row<T>>::choose();
    std::atomic<bool> nan{false};
    parallel_for(executor, rows, 1 + 16384 / (columns + 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        row_start[row] = mark(elements + row * columns, columns, bits + row * bitmask::bytes_per_row(columns));
        if (row_start[row] < 0) nan = true;
      }
    });
    if (nan) refuse_nan("weight", elements, rows, columns);
  });
  return counts_to_starts(row_start, rows);
}

void bitmask_gather(
    const void* weight, DType dtype, int64_t rows, int64_t columns, const uint8_t* bits, const int64_t* row_start, void* values,
    const Executor& executor) {
  const auto move = size_of(dtype) == 4 ? &gather<uint32_t> : &gather<uint16_t>;
  move(weight, rows, columns, bits, row_start, values, executor);
}

int64_t counts_to_starts(int64_t* counts, int64_t rows) {
  int64_t total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t count = counts[row];
    counts[row] = total;
    total += count;
  }
  return total;
}

}  // namespace sparsekern::cpu
