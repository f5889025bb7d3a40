// The k-th largest of integer keys, found by bisection over their range. Each step is a vectorised count, and no keys take more
// than 32 steps.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/isa.h"

namespace sparsekern::cpu {

// The kept keys: those above `key`, and those equal to it before index `ties_end`.
struct Cut {
  int32_t key;
  int64_t ties_end;
};

SPARSEKERN_INLINE int64_t count_above(const int32_t* keys, int64_t count, int32_t key) {
  int32_t above = 0;  // wide enough: a row is shorter than 2^31
  for (int64_t i = 0; i < count; ++i) above += keys[i] > key;
  return above;
}

SPARSEKERN_INLINE int64_t count_equal(const int32_t* keys, int64_t count, int32_t key) {
  int32_t equal = 0;
  for (int64_t i = 0; i < count; ++i) equal += keys[i] == key;
  return equal;
}

// Returns one past the index of the `needed`-th key that equals `key`, of which there are at least that many.
SPARSEKERN_INLINE int64_t end_of_ties(const int32_t* keys, int64_t count, int32_t key, int64_t needed) {
  constexpr int64_t kStride = 256;
  int64_t i = 0;
  for (; i + kStride < count; i += kStride) {
    const int64_t equal = count_equal(keys + i, kStride, key);
    if (equal >= needed) break;
    needed -= equal;
  }
  for (; needed > 0; ++i) needed -= keys[i] == key;
  return i;
}

SPARSEKERN_INLINE Cut kth_largest(const int32_t* keys, int64_t count, int64_t k) {
  int32_t low = keys[0];
  int32_t high = keys[0];
  for (int64_t i = 0; i < count; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  int64_t above = 0;  // number of keys above `high`, always less than k
  while (low < high) {
    const auto middle = static_cast<int32_t>((int64_t{low} + high) >> 1);
    const int64_t above_middle = count_above(keys, count, middle);
    if (above_middle == k) return {middle, 0};
    if (above_middle < k) {
      high = middle;
      above = above_middle;
    } else {
      low = middle + 1;
    }
  }
  return {high, end_of_ties(keys, count, high, k - above)};
}

SPARSEKERN_INLINE void write_mask(const int32_t* keys, int64_t count, Cut cut, uint8_t* mask) {
  const int64_t ties_end = std::clamp<int64_t>(cut.ties_end, 0, count);
  for (int64_t i = 0; i < ties_end; ++i) mask[i] = keys[i] >= cut.key;
  for (int64_t i = ties_end; i < count; ++i) mask[i] = keys[i] > cut.key;
}

}  // namespace sparsekern::cpu
