// The order keys of a run of scores (common/order_key.h), and the error for a score that has none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/order_key.h"
#include "cpu/isa.h"

namespace sparsekern::cpu {

// Writes keys[i], ordered like values[i]. Returns whether a value is NaN; its key is then meaningless.
template <class T>
SPARSEKERN_INLINE bool load_keys(const T* values, int64_t count, int32_t* keys) {
  int32_t highest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = signed_bits(values[i]);
    const int32_t magnitude = bits & magnitude_bits(T{});
    keys[i] = order_key(bits, magnitude);
    highest = magnitude > highest ? magnitude : highest;
  }
  return highest > infinity_bits(T{});
}

// Throws for the first NaN of a row-major matrix, if there is one.
template <class T>
void refuse_nan(const char* name, const T* values, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows * columns; ++i) {
    if ((signed_bits(values[i]) & magnitude_bits(T{})) > infinity_bits(T{})) {
      throw std::invalid_argument(
          std::string(name) + ": expected no NaN, got nan at [" + std::to_string(i / columns) + ", " + std::to_string(i % columns) +
          "]");
    }
  }
}

}  // namespace sparsekern::cpu
