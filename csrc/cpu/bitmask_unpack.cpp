// bitmask_unpack: the dense weight of what bitmask_pack packed. The bits are counted and checked before any value is read.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/bitmask_layout.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kWordBits = 64;

SPARSEKERN_INLINE int64_t count_bits(const uint8_t* bits, int64_t bytes) {
  int64_t set = 0;
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, bits + i, sizeof word);
    set += __builtin_popcountll(word);
  }
  for (; i < bytes; ++i) set += __builtin_popcount(bits[i]);
  return set;
}

template <class Bits>
SPARSEKERN_INLINE void expand_row(const Bits* values, int64_t columns, const uint8_t* bits, Bits* weight) {
  std::fill_n(weight, columns, Bits{0});
  for (int64_t first = 0; first < columns; first += kWordBits) {
    uint64_t word = 0;
    std::memcpy(&word, bits + first / 8, static_cast<size_t>(bitmask::bytes_per_row(std::min(kWordBits, columns - first))));
    for (; word != 0; word &= word - 1) weight[first + __builtin_ctzll(word)] = *values++;
  }
}

// The place of each row's values. Throws unless the padding is zero and the bits account for all values.
std::vector<int64_t> row_starts(const uint8_t* bits, int64_t rows, int64_t columns, int64_t values, const Executor& executor) {
  const int64_t bytes = bitmask::bytes_per_row(columns);
  const uint8_t padding = bitmask::padding_bits(columns);
  const auto count = Entries<&count_bits>::choose();
  std::vector<int64_t> starts(static_cast<size_t>(rows));
  std::atomic<bool> stray{false};
  parallel_for(executor, rows, 1 + 131072 / (columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* row_bits = bits + row * bytes;
      starts[static_cast<size_t>(row)] = count(row_bits, bytes);
      if (bytes > 0 && (row_bits[bytes - 1] & padding) != 0) stray = true;
    }
  });
  if (stray) {
    int64_t row = 0;
    while ((bits[(row + 1) * bytes - 1] & padding) == 0) ++row;
    throw std::invalid_argument(
        "bitmask: expected zeros past column " + std::to_string(columns - 1) + ", got a set bit in row " + std::to_string(row));
  }
  const int64_t set = counts_to_starts(starts.data(), rows);
  if (set != values) {
    throw std::invalid_argument(
        "values: expected as many as bits are set in bitmask (" + std::to_string(set) + "), got " + std::to_string(values));
  }
  return starts;
}

template <class Bits>
void expand(
    const void* values, const std::vector<int64_t>& starts, const uint8_t* bits, int64_t columns, void* weight,
    const Executor& executor) {
  const auto expand_one_row = Entries<&expand_row<Bits>>::choose();
  parallel_for(executor, static_cast<int64_t>(starts.size()), 1 + 16384 / (columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      expand_one_row(
          static_cast<const Bits*>(values) + starts[static_cast<size_t>(row)], columns,
          bits + row * bitmask::bytes_per_row(columns), static_cast<Bits*>(weight) + row * columns);
    }
  });
}

}  // namespace

void bitmask_unpack(
    const void* values, DType dtype, int64_t value_count, const uint8_t* bits, int64_t rows, int64_t columns, void* weight,
    const Executor& executor) {
  const std::vector<int64_t> starts = row_starts(bits, rows, columns, value_count, executor);
  const auto fill = size_of(dtype) == 4 ? &expand<uint32_t> : &expand<uint16_t>;
  fill(values, starts, bits, columns, weight, executor);
}

}  // namespace sparsekern::cpu
