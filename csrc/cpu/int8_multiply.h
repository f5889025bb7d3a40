// Kernels of int8_linear: one row of each stream times a few tokens. int8_linear.cpp gives the reasons.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/packed_linear.h"
#include "cpu/slot_floats.h"

namespace sparsekern::cpu::int8_multiply {

constexpr int kMostTokens = 4;  // that share the conversion of a weight; the sums of more do not fit the registers of AVX2

// Rows of the weight, one of each stream, and a few tokens to multiply by them. Zeros follow each token.
struct Rows {
  const int8_t* row[kStreams];
  int64_t columns;
  const float* x;  // the first token
  int64_t x_stride;
};

// Stores sums[row * kMostTokens + token].
using MultiplyRows = void (*)(const Rows& rows, float* sums);

template <int kRows, int kTokens>
void multiply_rows(const Rows& rows, float* sums) {
  for (int row = 0; row < kRows; ++row) {
    for (int token = 0; token < kTokens; ++token) {
      const float* x = rows.x + token * rows.x_stride;
      float sum = 0.0f;
      for (int64_t j = 0; j < rows.columns; ++j) sum += static_cast<float>(rows.row[row][j]) * x[j];
      sums[row * kMostTokens + token] = sum;
    }
  }
}

#if SPARSEKERN_X86

// The sums of a row and a token are spread over registers to hide the latency of multiply-adds.
constexpr int chains(int tokens) { return 4 / tokens; }

template <int kRows, int kTokens>
SPARSEKERN_AVX2 SPARSEKERN_INLINE void add_step(
    const int8_t* const (&row)[kRows], const float* x, int64_t x_stride, __m256 (&total)[kRows][kTokens][chains(kTokens)]) {
  constexpr int kChains = chains(kTokens);
#pragma GCC unroll 4
  for (int chain = 0; chain < kChains; ++chain) {
#pragma GCC unroll 2
    for (int i = 0; i < kRows; ++i) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row[i] + 8 * chain));
      const __m256 weight = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#pragma GCC unroll 4
      for (int token = 0; token < kTokens; ++token) {
        __m256& sum = total[i][token][chain];
        sum = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + token * x_stride + 8 * chain), sum);
      }
    }
  }
}

template <int kRows, int kTokens>
SPARSEKERN_AVX2 void multiply_rows_avx2(const Rows& rows, float* sums) {
  constexpr int kChains = chains(kTokens), kStep = 8 * kChains;
  __m256 total[kRows][kTokens][kChains];
  const int8_t* row[kRows];
#pragma GCC unroll 2
  for (int i = 0; i < kRows; ++i) {
    row[i] = rows.row[i];
#pragma GCC unroll 4
    for (int token = 0; token < kTokens; ++token) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) total[i][token][chain] = _mm256_setzero_ps();
    }
  }
  const float* x = rows.x;
  int64_t left = rows.columns;
  for (; left >= kStep; left -= kStep, x += kStep) {
    add_step(row, x, rows.x_stride, total);
#pragma GCC unroll 2
    for (int i = 0; i < kRows; ++i) row[i] += kStep;
  }
  if (left > 0) {  // the last columns, copied because the memory may end here
    int8_t last[kRows][kStep] = {};
    for (int i = 0; i < kRows; ++i) {
      std::copy_n(row[i], left, last[i]);
      row[i] = last[i];
    }
    add_step(row, x, rows.x_stride, total);
  }
#pragma GCC unroll 2
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int token = 0; token < kTokens; ++token) {
      __m256 sum = total[i][token][0];
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) sum = _mm256_add_ps(sum, total[i][token][chain]);
      sums[i * kMostTokens + token] = add_up(sum);
    }
  }
}

#endif

// With AVX-512 the kernel of AVX2 runs: memory bounds it too.
template <int kRows, int kTokens>
MultiplyRows choose_multiply([[maybe_unused]] Isa isa) {
#if SPARSEKERN_X86
  if (isa >= Isa::avx2) return &multiply_rows_avx2<kRows, kTokens>;
#endif
  return &multiply_rows<kRows, kTokens>;
}

template <int kTokens>
ByStreams<MultiplyRows> multiply_by_streams(Isa isa) {
  return {choose_multiply<1, kTokens>(isa), choose_multiply<kStreams, kTokens>(isa)};
}

}  // namespace sparsekern::cpu::int8_multiply
