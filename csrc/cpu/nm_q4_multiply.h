// Kernels of nm_q4_linear: a strip of rows times a few tokens. nm_q4_linear.cpp gives the reasons for the layout.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "cpu/nm_q4_activations.h"
#include "cpu/slot_floats.h"

#if SPARSEKERN_X86
#include <immintrin.h>
#endif

namespace sparsekern::cpu::nm_q4_multiply {

using nm_q4::kColumns;
using nm_q4::kQuarterColumns;
using nm_q4::kQuarters;
using nm_q4::kRun;
using nm_q4::Layout;

constexpr int64_t kMostRows = 16;   // of a strip
constexpr int64_t kMostTokens = 4;  // that share the unpacking of a block

SPARSEKERN_INLINE float scale_of(const uint8_t* block, const Layout& layout, int64_t row) {
  Half scale;
  std::memcpy(&scale, block + layout.scales_at() + 2 * row, sizeof scale);
  return to_float(scale);
}

SPARSEKERN_INLINE int64_t bits_at(const uint8_t* block, Layout::Place place, int64_t mask) {
  return block[place.byte] >> place.shift & mask;
}

// Calls f(column, value) for each stored value of a row, with its column in the block. No position leads out of the quarter.
template <class F>
SPARSEKERN_INLINE void for_each_value(const uint8_t* block, const Layout& layout, int64_t row, const F& f) {
  for (int64_t quarter = 0; quarter < kQuarters; ++quarter) {
    for (int64_t k = 0; k < layout.kept(); ++k) {
      const int64_t position = bits_at(block, layout.position(row, quarter, k), layout.position_mask());
      const int64_t value = bits_at(block, layout.value(row, quarter, k), 15) - nm_q4::kZero;
      f(layout.group_column(quarter, k) + position, static_cast<int32_t>(value));
    }
  }
}

// Stores sums[token * kMostRows + row] of the rows of a strip.
using MultiplyStrip = void (*)(const uint8_t* strip, const QuantisedTokens& x, float* sums);

template <int kN, int kM, int kTokens>
void multiply_strip(const uint8_t* strip, const QuantisedTokens& x, float* sums) {
  constexpr Layout layout{kN, kM};
  std::fill_n(sums, kTokens * kMostRows, 0.0f);
  for (int64_t b = 0; b < x.blocks; ++b) {
    const uint8_t* block = strip + b * layout.bytes();
    for (int64_t row = 0; row < layout.rows(); ++row) {
      const float scale = scale_of(block, layout, row);
      int32_t totals[kTokens] = {};
      for_each_value(block, layout, row, [&](int64_t column, int32_t value) {
        for (int token = 0; token < kTokens; ++token) totals[token] += value * x.from(token).values[b * kColumns + column];
      });
      for (int token = 0; token < kTokens; ++token) {
        sums[token * kMostRows + row] += scale * x.from(token).scales[b] * static_cast<float>(totals[token]);
      }
    }
  }
}

#if SPARSEKERN_X86

// What is added to the positions of a register: the first column of each group, in its quarter.
template <int kN, int kM>
struct GroupColumns {
  alignas(32) int8_t of[kRun];

  constexpr GroupColumns() : of{} {
    constexpr Layout layout{kN, kM};
    for (int64_t lane = 0; lane < kRun; ++lane) of[lane] = static_cast<int8_t>(layout.group_column(0, lane % layout.kept()));
  }
};
template <int kN, int kM>
constexpr GroupColumns<kN, kM> kGroupColumns{};

SPARSEKERN_AVX2 SPARSEKERN_INLINE __m256i load_run(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// Returns the columns in their quarter of the values of half a strip.
template <int kN, int kM>
SPARSEKERN_AVX2 SPARSEKERN_INLINE __m256i columns_of(const uint8_t* block, int half, int quarter) {
  if constexpr (Layout{kN, kM}.wide()) {
    static_assert(kM == kQuarterColumns, "a group is a quarter");
    const __m256i both = load_run(block + 2 * kRun * quarter);
    return _mm256_and_si256(half == 0 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
  } else {
    const __m256i all = load_run(block + kRun * half);
    const __m256i positions = _mm256_and_si256(quarter == 0 ? all : _mm256_srli_epi16(all, 2 * quarter), _mm256_set1_epi8(3));
    const auto* first = reinterpret_cast<const __m256i*>(kGroupColumns<kN, kM>.of);
    return _mm256_or_si256(positions, _mm256_load_si256(first));
  }
}

// Returns the values of half a strip in a quarter, plus kZero.
template <int kN, int kM>
SPARSEKERN_AVX2 SPARSEKERN_INLINE __m256i values_of(const uint8_t* block, int half, int quarter) {
  constexpr bool kWide = Layout{kN, kM}.wide();
  const __m256i both =
      load_run(kWide ? block + 2 * kRun * quarter + kRun : block + 2 * kRun + 2 * kRun * (quarter / 2) + kRun * half);
  const bool high = (kWide ? half : quarter % 2) != 0;
  return _mm256_and_si256(high ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
}

// A sum of 64 columns stays in 16 bits: 4 quarters of two products, each at most 15 * 127, less 8 of the activations.
template <int kN, int kM, int kTokens>
SPARSEKERN_AVX2 void multiply_strip_avx2(const uint8_t* strip, const QuantisedTokens& x, float* sums) {
  constexpr Layout layout{kN, kM};
  constexpr bool kPairs = layout.kept() == 8;  // a row has two sums of 32 bits, else one
  constexpr int kRegisters = layout.rows() / 8;
  static_assert(layout.kept() == 8 || layout.kept() == 4);
  const __m256i eight = _mm256_set1_epi8(nm_q4::kZero), ones = _mm256_set1_epi16(1);
  __m256 totals[kTokens][kRegisters];
#pragma GCC unroll 4
  for (int token = 0; token < kTokens; ++token) {
#pragma GCC unroll 2
    for (int i = 0; i < kRegisters; ++i) totals[token][i] = _mm256_setzero_ps();
  }
  const int64_t blocks = x.blocks;
  const uint8_t* block = strip;
  for (int64_t b = 0; b < blocks; ++b, block += layout.bytes()) {
    for (int64_t line = 0; line < layout.bytes(); line += 64) prefetch_ahead(block + line);
    __m256i products[kTokens][2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
      for (int quarter = 0; quarter < kQuarters; ++quarter) {
        const __m256i columns = columns_of<kN, kM>(block, half, quarter), values = values_of<kN, kM>(block, half, quarter);
#pragma GCC unroll 4
        for (int token = 0; token < kTokens; ++token) {
          const int8_t* given = x.values + (token * blocks + b) * kColumns + quarter * kQuarterColumns;
          const __m256i some = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(given)));
          const __m256i picked = _mm256_shuffle_epi8(some, columns);
          const __m256i product = _mm256_maddubs_epi16(values, picked), offset = _mm256_maddubs_epi16(eight, picked);
          __m256i& sum = products[token][half];
          sum = _mm256_sub_epi16(quarter == 0 ? product : _mm256_add_epi16(sum, product), offset);
        }
      }
    }
    const auto* stored = reinterpret_cast<const __m128i*>(block + layout.scales_at());
#pragma GCC unroll 2
    for (int i = 0; i < kRegisters; ++i) {
      __m128i halves = _mm_loadu_si128(stored + i);
      if constexpr (kPairs) halves = _mm_shuffle_epi32(halves, 0xd8);  // rows 0, 1, 4, 5, 2, 3, 6, 7, as vphaddd leaves them
      const __m256 scales = _mm256_cvtph_ps(halves);
#pragma GCC unroll 4
      for (int token = 0; token < kTokens; ++token) {
        const __m256 both = _mm256_mul_ps(scales, _mm256_broadcast_ss(x.scales + token * blocks + b));
        __m256i whole;
        if constexpr (kPairs) {
          const __m256i low = _mm256_madd_epi16(products[token][0], ones), high = _mm256_madd_epi16(products[token][1], ones);
          whole = _mm256_hadd_epi32(low, high);
        } else {
          whole = _mm256_madd_epi16(products[token][i], ones);
        }
        totals[token][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), both, totals[token][i]);
      }
    }
  }
#pragma GCC unroll 4
  for (int token = 0; token < kTokens; ++token) {
#pragma GCC unroll 2
    for (int i = 0; i < kRegisters; ++i) {
      __m256 total = totals[token][i];
      if constexpr (kPairs) total = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(total), 0xd8));
      _mm256_storeu_ps(sums + token * kMostRows + 8 * i, total);
    }
  }
}

// Returns the columns in their quarter of the values of a strip.
template <int kN, int kM>
SPARSEKERN_AVX512 SPARSEKERN_INLINE __m512i strip_columns_of(const uint8_t* block, int quarter) {
  if constexpr (Layout{kN, kM}.wide()) {
    const __m256i both = load_run(block + 2 * kRun * quarter);
    const __m512i apart = _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
    return _mm512_and_si512(apart, _mm512_set1_epi8(15));
  } else {
    const __m512i all = _mm512_loadu_si512(block);
    const __m512i first =
        _mm512_maskz_broadcast_i64x4(0xff, _mm256_load_si256(reinterpret_cast<const __m256i*>(kGroupColumns<kN, kM>.of)));
    const __m512i shifted = quarter == 0 ? all : _mm512_srli_epi16(all, static_cast<unsigned>(2 * quarter));
    return _mm512_ternarylogic_epi64(shifted, _mm512_set1_epi8(3), first, 0xea);  // (shifted & 3) | first
  }
}

// Returns the values of a strip in a quarter, plus kZero.
template <int kN, int kM>
SPARSEKERN_AVX512 SPARSEKERN_INLINE __m512i strip_values_of(const uint8_t* block, int quarter) {
  __m512i values;
  if constexpr (Layout{kN, kM}.wide()) {
    const __m256i both = load_run(block + 2 * kRun * quarter + kRun);
    values = _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
  } else {
    const __m512i both = _mm512_loadu_si512(block + 2 * kRun + 2 * kRun * (quarter / 2));
    values = quarter % 2 == 0 ? both : _mm512_srli_epi16(both, 4);
  }
  return _mm512_and_si512(values, _mm512_set1_epi8(15));
}

// The same as with AVX2; a register holds both halves of a strip.
template <int kN, int kM, int kTokens>
SPARSEKERN_AVX512 void multiply_strip_avx512(const uint8_t* strip, const QuantisedTokens& x, float* sums) {
  constexpr Layout layout{kN, kM};
  constexpr bool kPairs = layout.kept() == 8;
  const __m512i eight = _mm512_set1_epi8(nm_q4::kZero), ones = _mm512_set1_epi16(1);
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  __m512 totals[kTokens];
#pragma GCC unroll 4
  for (int token = 0; token < kTokens; ++token) totals[token] = _mm512_setzero_ps();
  const int64_t blocks = x.blocks;
  const uint8_t* block = strip;
  for (int64_t b = 0; b < blocks; ++b, block += layout.bytes()) {
    for (int64_t line = 0; line < layout.bytes(); line += 64) prefetch_ahead(block + line);
    __m512i products[kTokens];
#pragma GCC unroll 4
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      const __m512i columns = strip_columns_of<kN, kM>(block, quarter), values = strip_values_of<kN, kM>(block, quarter);
#pragma GCC unroll 4
      for (int token = 0; token < kTokens; ++token) {
        const int8_t* given = x.values + (token * blocks + b) * kColumns + quarter * kQuarterColumns;
        const __m512i some = _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(given)));
        const __m512i picked = _mm512_shuffle_epi8(some, columns);
        const __m512i product = _mm512_maddubs_epi16(values, picked), offset = _mm512_maddubs_epi16(eight, picked);
        __m512i& sum = products[token];
        sum = _mm512_sub_epi16(quarter == 0 ? product : _mm512_add_epi16(sum, product), offset);
      }
    }
    const uint8_t* stored = block + layout.scales_at();
    __m512 scales;
    if constexpr (kPairs) {
      const __m256 eight_scales = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(stored)));
      scales = _mm512_maskz_permutexvar_ps(0xffff, twice, _mm512_castps256_ps512(eight_scales));
    } else {
      scales = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stored)));
    }
#pragma GCC unroll 4
    for (int token = 0; token < kTokens; ++token) {
      const __m512 both = _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[token * blocks + b]));
      const __m512 whole = _mm512_maskz_cvtepi32_ps(0xffff, _mm512_madd_epi16(products[token], ones));
      totals[token] = _mm512_fmadd_ps(whole, both, totals[token]);
    }
  }
#pragma GCC unroll 4
  for (int token = 0; token < kTokens; ++token) {
    float parts[16];
    _mm512_storeu_ps(parts, totals[token]);
    for (int64_t row = 0; row < layout.rows(); ++row) {
      sums[token * kMostRows + row] = kPairs ? parts[2 * row] + parts[2 * row + 1] : parts[row];
    }
  }
}

#endif

template <int kN, int kM, int kTokens>
MultiplyStrip choose_multiply([[maybe_unused]] Isa isa) {
#if SPARSEKERN_X86
  if (isa >= Isa::avx512) return &multiply_strip_avx512<kN, kM, kTokens>;
  if (isa == Isa::avx2) return &multiply_strip_avx2<kN, kM, kTokens>;
#endif
  return &multiply_strip<kN, kM, kTokens>;
}

// Returns the kernel for 1 << power tokens.
template <int kN, int kM>
MultiplyStrip choose_multiply_of(Isa isa, int power) {
  static_assert(kMostTokens == 4, "2^2");
  return power == 0   ? choose_multiply<kN, kM, 1>(isa)
         : power == 1 ? choose_multiply<kN, kM, 2>(isa)
                      : choose_multiply<kN, kM, 4>(isa);
}

inline MultiplyStrip choose_multiply(const Layout& layout, Isa isa, int power) {
  if (layout.wide()) return choose_multiply_of<4, 16>(isa, power);
  return layout.n == 2 ? choose_multiply_of<2, 4>(isa, power) : choose_multiply_of<1, 4>(isa, power);
}

}  // namespace sparsekern::cpu::nm_q4_multiply
