// Scores as integers in the same order: what selection compares, so that one code serves every dtype.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace sparsekern::cpu {

SPARSEKERN_INLINE int32_t signed_bits(float value) { return static_cast<int32_t>(float_to_bits(value)); }
SPARSEKERN_INLINE int32_t signed_bits(BFloat16 value) { return static_cast<int16_t>(value.bits); }
SPARSEKERN_INLINE int32_t signed_bits(Half value) { return static_cast<int16_t>(value.bits); }

constexpr int32_t magnitude_bits(float) { return 0x7fffffff; }
constexpr int32_t magnitude_bits(BFloat16) { return 0x7fff; }
constexpr int32_t magnitude_bits(Half) { return 0x7fff; }

// Magnitudes above it are NaN.
constexpr int32_t infinity_bits(float) { return 0x7f800000; }
constexpr int32_t infinity_bits(BFloat16) { return 0x7f80; }
constexpr int32_t infinity_bits(Half) { return 0x7c00; }

// keys[i] orders like values[i]: sign and magnitude become two's complement, which makes both zeros 0. Returns whether a value is
// NaN (its key is then meaningless).
template <class T>
SPARSEKERN_INLINE bool load_keys(const T* values, int64_t count, int32_t* keys) {
  int32_t highest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = signed_bits(values[i]);
    const int32_t magnitude = bits & magnitude_bits(T{});
    const int32_t sign = bits >> 31;
    keys[i] = (magnitude ^ sign) - sign;
    highest = magnitude > highest ? magnitude : highest;
  }
  return highest > infinity_bits(T{});
}

// Throws for the first NaN of a row-major matrix, if it has one.
template <class T>
void refuse_nan(const char* name, const T* values, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows * columns; ++i) {
    if ((signed_bits(values[i]) & magnitude_bits(T{})) > infinity_bits(T{})) {
      throw std::invalid_argument(
          std::string(name) + ": expected no NaN, got nan at [" + std::to_string(i / columns) + ", " +
          std::to_string(i % columns) + "]");
    }
  }
}

}  // namespace sparsekern::cpu
