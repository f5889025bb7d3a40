// Kernels of nm_linear for up to kTogether tokens, which multiply by the stored values without unpacking them, and the expansion of a
// tile into a panel. nm_linear.cpp gives the reasons for the layout; nm_multiply_avx2.h has the kernels for AVX2.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/packed_linear.h"
#include "cpu/slot_floats.h"

namespace sparsekern::cpu::nm_multiply {

using packed_rows::kBlockSlots;
using packed_rows::Slot;

// Factors: a few tokens that are multiplied by rows of the weight.
struct Factors {
  int64_t blocks;                // blocks of a row
  const int32_t* group_columns;  // the first column of the group of each value
  int code_bits;
  int64_t n;
  const float* x;  // the first token
  int64_t x_stride;
};

// A row of the weight; a product stores sums[token * kTileRows].
struct Row {
  const Slot* slots;
  const uint32_t* codes;
  float* sums;
};

SPARSEKERN_INLINE int32_t position_of(const uint32_t* codes, int64_t k, int code_bits) {
  const int64_t bit = k * code_bits;
  return static_cast<int32_t>(codes[bit / 32] >> bit % 32 & ((1u << code_bits) - 1));
}

// Multiplies kTokens tokens by several rows.
template <class T, int kTokens>
SPARSEKERN_INLINE void multiply_any(const Factors& factors, const Row* row) {
  float sums[kTokens] = {};
  for (int64_t block = 0; block < factors.blocks; ++block) {
    for (int run = 0; run < kSlotValues<T>; ++run) {
      for (int64_t d = 0; d < kBlockSlots; ++d) {
        const int64_t k = (block * kSlotValues<T> + run) * kBlockSlots + d;
        const float value = value_of<T>(row->slots + block * kBlockSlots + d, run);
        const float* x = factors.x + factors.group_columns[k] + position_of(row->codes, k, factors.code_bits);
        for (int token = 0; token < kTokens; ++token) sums[token] += value * x[token * factors.x_stride];
      }
    }
  }
  for (int token = 0; token < kTokens; ++token) row->sums[token * packed_rows::kTileRows] = sums[token];
}

#if SPARSEKERN_X86

// Returns the positions of 16 values, with unrelated higher bits of their words above them. (Masked, here and below, because GCC 12
// warns that the unmasked intrinsics leave values uninitialised.)
template <bool kWide>
SPARSEKERN_AVX512 SPARSEKERN_INLINE __m512i codes_of_run(const uint32_t* codes, int64_t run) {
  if constexpr (!kWide) {
    const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_maskz_srlv_epi32(0xffff, _mm512_set1_epi32(static_cast<int>(codes[run])), shifts);
  } else {
    const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i low = _mm512_set1_epi32(static_cast<int>(codes[2 * run]));
    return _mm512_maskz_srlv_epi32(0xffff, _mm512_mask_set1_epi32(low, 0xff00, static_cast<int>(codes[2 * run + 1])), shifts);
  }
}

// N:2N with N of 1, 2, 4 or 8: the 16 values of a run come from 32 consecutive columns.
template <class T, int kTokens, bool kWide, int kRows>
SPARSEKERN_AVX512 void multiply_half_avx512(const Factors& factors, const Row* rows) {
  const __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto shift = static_cast<unsigned>(__builtin_ctzll(static_cast<uint64_t>(factors.n)));
  const auto groups = (__m512i)((__v16su)place >> shift << (shift + 1));
  const __m512i code = _mm512_set1_epi32(kWide ? 15 : 3);
  __m512 sums[kRows][kSlotValues<T>][kTokens];
  const Slot* slots[kRows];
  const uint32_t* codes[kRows];
#pragma GCC unroll 2
  for (int row = 0; row < kRows; ++row) {
    slots[row] = rows[row].slots;
    codes[row] = rows[row].codes;
#pragma GCC unroll 2
    for (int run = 0; run < kSlotValues<T>; ++run) {
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) sums[row][run][token] = _mm512_setzero_ps();
    }
  }
  const auto [blocks, group_columns, code_bits, n, x, x_stride] = factors;
  for (int64_t block = 0; block < blocks; ++block) {
    __m512i stored[kRows];
#pragma GCC unroll 2
    for (int row = 0; row < kRows; ++row) {
      prefetch_ahead(slots[row] + block * kBlockSlots);
      stored[row] = _mm512_loadu_si512(slots[row] + block * kBlockSlots);
    }
#pragma GCC unroll 2
    for (int run = 0; run < kSlotValues<T>; ++run) {
      const int64_t i = block * kSlotValues<T> + run;
#pragma GCC unroll 2
      for (int row = 0; row < kRows; ++row) {
        const __m512i columns =
            _mm512_ternarylogic_epi32(codes_of_run<kWide>(codes[row], i), code, groups, 0xea);  // (codes & code) | groups
        const __m512 weight = floats_of_slots<T>(stored[row], run);
#pragma GCC unroll 8
        for (int token = 0; token < kTokens; ++token) {
          const float* features = x + token * x_stride + i * 32;
          const __m512 picked = _mm512_permutex2var_ps(_mm512_loadu_ps(features), columns, _mm512_loadu_ps(features + 16));
          sums[row][run][token] = _mm512_fmadd_ps(weight, picked, sums[row][run][token]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int token = 0; token < kTokens; ++token) {
      __m512 sum = sums[row][0][token];
      if constexpr (kSlotValues<T> == 2) sum = _mm512_add_ps(sum, sums[row][1][token]);
      rows[row].sums[token * packed_rows::kTileRows] = add_up(sum);
    }
  }
}

template <class T, int kTokens, bool kWide>
SPARSEKERN_AVX512 void multiply_any_avx512(const Factors& factors, const Row* row) {
  const __m512i code = _mm512_set1_epi32(kWide ? 15 : 3);
  __m512 sums[kTokens];
#pragma GCC unroll 8
  for (int token = 0; token < kTokens; ++token) sums[token] = _mm512_setzero_ps();
  const auto [slots, codes, out] = *row;
  const auto [blocks, group_columns, code_bits, n, x, x_stride] = factors;
  for (int64_t block = 0; block < blocks; ++block) {
    prefetch_ahead(slots + block * kBlockSlots);
    const __m512i stored = _mm512_loadu_si512(slots + block * kBlockSlots);
#pragma GCC unroll 2
    for (int run = 0; run < kSlotValues<T>; ++run) {
      const int64_t i = block * kSlotValues<T> + run;
      const auto positions = (__v16su)codes_of_run<kWide>(codes, i) & (__v16su)code;
      const __m512i columns = _mm512_add_epi32((__m512i)positions, _mm512_loadu_si512(group_columns + i * kBlockSlots));
      const __m512 weight = floats_of_slots<T>(stored, run);
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        const __m512 picked = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, columns, x + token * x_stride, 4);
        sums[token] = _mm512_fmadd_ps(weight, picked, sums[token]);
      }
    }
  }
#pragma GCC unroll 8
  for (int token = 0; token < kTokens; ++token) out[token * packed_rows::kTileRows] = add_up(sums[token]);
}

// Expands the rows of a tile, at most 16, to panel[16 * column + row], block by block, so that the output stays in L1. Uses
// `stored` values per row. Returns false if a position is past the last column.
template <class T, bool kWide>
SPARSEKERN_AVX512 bool expand_panel_avx512(
    const Factors& factors, const Row* rows, int count, int64_t stored, int64_t columns, float* panel) {
  const __m512i code = _mm512_set1_epi32(kWide ? 15 : 3);
  const __m512i end = _mm512_set1_epi32(static_cast<int>(columns));
  for (int64_t block = 0; block < factors.blocks; ++block) {
    for (int row = 0; row < count; ++row) {
      const __m512i slots = _mm512_loadu_si512(rows[row].slots + block * kBlockSlots);
#pragma GCC unroll 2
      for (int run = 0; run < kSlotValues<T>; ++run) {
        const int64_t i = block * kSlotValues<T> + run;
        const auto positions = (__v16su)codes_of_run<kWide>(rows[row].codes, i) & (__v16su)code;
        const __m512i column = _mm512_add_epi32((__m512i)positions, _mm512_loadu_si512(factors.group_columns + i * kBlockSlots));
        const auto meant = static_cast<__mmask16>((1u << std::clamp<int64_t>(stored - i * kBlockSlots, 0, kBlockSlots)) - 1);
        if (_mm512_mask_cmpge_epu32_mask(meant, column, end) != 0) return false;
        static_assert(kLanes == 16, "of the shift");
        _mm512_mask_i32scatter_ps(panel + row, meant, (__m512i)((__v16su)column << 4), floats_of_slots<T>(slots, run), 4);
      }
    }
  }
  return true;
}

#endif

using Multiply = void (*)(const Factors&, const Row*);

template <Multiply kOne>
void one_by_one(const Factors& factors, const Row* rows) {
  kOne(factors, rows);
  kOne(factors, rows + 1);
}

template <Multiply kOne>
constexpr ByStreams<Multiply> kOneByOne{kOne, &one_by_one<kOne>};

#if SPARSEKERN_X86

template <class T, int kTokens, bool kWide>
ByStreams<Multiply> choose_multiply_avx512(bool half) {
  if (!half) return kOneByOne<&multiply_any_avx512<T, kTokens, kWide>>;
  constexpr Multiply one = &multiply_half_avx512<T, kTokens, kWide, 1>;
  if constexpr (kTokens > 4)
    return kOneByOne<one>;  // two streams would not fit the registers
  else
    return {one, &multiply_half_avx512<T, kTokens, kWide, 2>};
}

#endif

template <class T, int kTokens>
ByStreams<Multiply> choose_multiply([[maybe_unused]] Isa isa, [[maybe_unused]] int64_t n, [[maybe_unused]] int64_t m) {
#if SPARSEKERN_X86
  if (isa >= Isa::avx512) {
    const bool half = m == 2 * n && (n & (n - 1)) == 0;
    return packed_rows::code_bits(m) == 2 ? choose_multiply_avx512<T, kTokens, false>(half)
                                          : choose_multiply_avx512<T, kTokens, true>(half);
  }
#endif
  return kOneByOne<&multiply_any<T, kTokens>>;
}

}  // namespace sparsekern::cpu::nm_multiply
