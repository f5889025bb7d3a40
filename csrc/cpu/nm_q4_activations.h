// Activations as 8-bit integers, with a scale for each token and 64 columns.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/nm_q4.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/panels.h"

namespace sparsekern::cpu {

constexpr float kMostActivation = 127.0f;

// Returns the nearest whole number, ties to even, of a value below 2^22. Vectorises for every target.
SPARSEKERN_INLINE float nearest_whole(float value) {
  constexpr float kRounder = 0x1.8p23f;
  return (value + kRounder) - kRounder;
}

struct Quantised {
  int8_t* values;  // kColumns of them
  float* scale;
};

// Quantises 64 columns: x = scale * value. One that is NaN or Inf makes the scale NaN and the values 0.
SPARSEKERN_INLINE void quantise_columns(const float* x, const Quantised& out) {
  constexpr int64_t kColumns = nm_q4::kColumns;
  uint32_t most = 0;
  for (int64_t i = 0; i < kColumns; ++i) most = std::max(most, float_to_bits(x[i]) & 0x7fffffffu);
  const bool finite = most < 0x7f800000u;
  const float scale = bits_to_float(most) / kMostActivation;
  const bool usable = finite && scale > 0.0f;
  const float divisor = usable ? scale : 1.0f;
  for (int64_t i = 0; i < kColumns; ++i) {
    const float value = usable ? x[i] : 0.0f;
    // A scale below the normal floats may be far from what divides to 127.
    const float scaled = std::clamp(value / divisor, -kMostActivation, kMostActivation);
    out.values[i] = static_cast<int8_t>(static_cast<int32_t>(nearest_whole(scaled)));
  }
  *out.scale = finite ? scale : std::numeric_limits<float>::quiet_NaN();
}

// Quantises a token, whose last block is filled up with zeros.
template <class T>
SPARSEKERN_INLINE void quantise_token(const T* x, int64_t columns, int8_t* values, float* scales) {
  alignas(64) float block[nm_q4::kColumns];
  for (int64_t first = 0; first < columns; first += nm_q4::kColumns) {
    const int64_t given = std::min(nm_q4::kColumns, columns - first);
    if (given < nm_q4::kColumns) std::fill_n(block, nm_q4::kColumns, 0.0f);
    for (int64_t i = 0; i < given; ++i) block[i] = to_float(x[first + i]);
    quantise_columns(block, {values + first, scales + first / nm_q4::kColumns});
  }
}

// Tokens of `blocks` blocks each.
struct QuantisedTokens {
  const int8_t* values;  // [tokens][blocks][64]
  const float* scales;   // [tokens][blocks]
  int64_t blocks;

  QuantisedTokens from(int64_t token) const { return {values + token * blocks * nm_q4::kColumns, scales + token * blocks, blocks}; }
};

struct QuantisedActivations {
  int64_t blocks;
  Buffer<int8_t> values;
  Buffer<float> scales;

  template <class T>
  QuantisedActivations(const T* x, int64_t tokens, int64_t columns, Isa isa, const Executor& executor)
      : blocks(nm_q4::blocks(columns)),
        values(allocate<int8_t>(tokens * blocks * nm_q4::kColumns)),
        scales(allocate<float>(tokens * blocks)) {
    const auto quantise = Entries<&quantise_token<T>>::choose(isa);
    parallel_for(executor, tokens, 1 + 65536 / (columns + 1), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        quantise(x + token * columns, columns, values.get() + token * blocks * nm_q4::kColumns, scales.get() + token * blocks);
      }
    });
  }

  QuantisedTokens tokens() const { return {values.get(), scales.get(), blocks}; }

  // Writes `columns` floats of a token, as its integers represent them.
  void restore(int64_t token, int64_t columns, float* x) const {
    const QuantisedTokens own = tokens().from(token);
    for (int64_t j = 0; j < columns; ++j) x[j] = own.scales[j / nm_q4::kColumns] * static_cast<float>(own.values[j]);
  }
};

}  // namespace sparsekern::cpu
