// Kernels of bitmask_linear for up to kTogether tokens, which multiply by the packed non-zeros without unpacking them.
// bitmask_linear.cpp gives the reasons for the layout.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/bitmask_rows.h"
#include "cpu/packed_linear.h"
#include "cpu/slot_floats.h"

namespace sparsekern::cpu::bitmask_multiply {

// Factors: a few tokens that are multiplied by rows of the weight.
struct Factors {
  const Slot* last;  // the last slot from which a word of bits may be read
  int64_t words;
  const float* x;  // the first token
  int64_t x_stride;
};

// Rows whose values share slots. A product advances `slots` past the group and stores sums[token * kTileRows + lane].
struct Group {
  const Slot* slots;
  const uint64_t* bits[2];  // bits of each row
  float* sums;
};

// Multiplies kTokens tokens by several groups. Returns false if the bits lead outside the values.
template <class T, int kTokens>
bool multiply_scalar(const Factors& factors, Group* group) {
  const Slot* end = group->slots;
  for (int row = 0; row < kSlotValues<T>; ++row) {
    const Slot* slot = group->slots;
    float sums[kTokens] = {};
    for (int64_t word = 0; word < factors.words; ++word) {
      if (slot > factors.last) return false;
      const float* x = factors.x + word * packed_rows::kWordColumns;
      for (uint64_t bits = group->bits[row][word]; bits != 0; bits &= bits - 1) {
        const float value = value_of<T>(slot++, row);
        for (int token = 0; token < kTokens; ++token) sums[token] += value * x[token * factors.x_stride + __builtin_ctzll(bits)];
      }
    }
    for (int token = 0; token < kTokens; ++token) group->sums[token * packed_rows::kTileRows + row] = sums[token];
    end = std::max(end, slot);
  }
  group->slots = end;
  return true;
}

#if SPARSEKERN_X86

template <class T, int kTokens, int kGroups>
SPARSEKERN_AVX512 bool multiply_avx512(const Factors& factors, Group* groups) {
  constexpr int kRows = kSlotValues<T>;
  const auto [last, words, x, x_stride] = factors;
  __m512 sums[kGroups][kRows][kTokens];
  const Slot* slot[kGroups][kRows];
  const uint64_t* bits[kGroups][kRows];
#pragma GCC unroll 2
  for (int group = 0; group < kGroups; ++group) {
#pragma GCC unroll 2
    for (int row = 0; row < kRows; ++row) {
      slot[group][row] = groups[group].slots;
      bits[group][row] = groups[group].bits[row];
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) sums[group][row][token] = _mm512_setzero_ps();
    }
  }
  for (int64_t word = 0; word < words; ++word) {
#pragma GCC unroll 2
    for (int group = 0; group < kGroups; ++group) {
#pragma GCC unroll 2
      for (int row = 0; row < kRows; ++row) {
        if (__builtin_expect(slot[group][row] > last, 0)) return false;
        prefetch_ahead(slot[group][0] + 16 * row);
      }
    }
    if (word % 8 == 0) {  // prefetch the next group's cache line of bits
      for (int group = 0; group < kGroups; ++group) {
        for (int row = 0; row < kRows; ++row) prefetch_ahead(bits[group][row] + word, kRows * words * 8);
      }
    }
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      __m512 features[kTokens];
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        features[token] = _mm512_loadu_ps(x + token * x_stride + word * packed_rows::kWordColumns + part * 16);
      }
#pragma GCC unroll 2
      for (int group = 0; group < kGroups; ++group) {
#pragma GCC unroll 2
        for (int row = 0; row < kRows; ++row) {
          const uint32_t mask = bits_of_part(bits[group][row] + word, part);
          const __m512i slots = _mm512_maskz_expandloadu_epi32(static_cast<__mmask16>(mask), slot[group][row]);
          const __m512 weight = floats_of_slots<T>(slots, row);
          slot[group][row] += __builtin_popcount(mask);
#pragma GCC unroll 8
          for (int token = 0; token < kTokens; ++token) {
            sums[group][row][token] = _mm512_fmadd_ps(weight, features[token], sums[group][row][token]);
          }
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int group = 0; group < kGroups; ++group) {
#pragma GCC unroll 2
    for (int row = 0; row < kRows; ++row) {
      groups[group].slots = std::max(groups[group].slots, slot[group][row]);
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        groups[group].sums[token * packed_rows::kTileRows + row] = add_up(sums[group][row][token]);
      }
    }
  }
  return true;
}

// For each byte of bits, where the weights of its 8 columns are in a load of 8 slots, in the three lowest bits. All bits above the
// seventh are ones where there is a weight, and zeros where there is none.
struct Places {
  alignas(64) int8_t of[256][8];
};

constexpr Places make_places() {
  Places places{};
  for (int bits = 0; bits < 256; ++bits) {
    for (int column = 0, next = 0; column < 8; ++column) {
      if (bits >> column & 1) places.of[bits][column] = static_cast<int8_t>(next++ - 128);
    }
  }
  return places;
}

constexpr Places kPlaces = make_places();

// Returns a value of each of 8 slots.
template <class T>
SPARSEKERN_AVX2 SPARSEKERN_INLINE __m256 floats_of_eight(const Slot* slot, [[maybe_unused]] int row) {
  if constexpr (std::is_same_v<T, Half>) {
    const __m128i bytes = _mm_set1_epi64x(row == 0 ? 0x0d0c090805040100 : 0x0f0e0b0a07060302);
    const __m128i low = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(slot)), bytes);
    const __m128i high = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(slot + 4)), bytes);
    return _mm256_cvtph_ps(_mm_unpacklo_epi64(low, high));
  } else {
    return floats_of_slots<T>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(slot)), row);
  }
}

// Returns 8 weights of a row, zeros included, and advances `slot` past their values.
template <class T>
SPARSEKERN_AVX2 SPARSEKERN_INLINE __m256 next_weights(const Slot*& slot, uint8_t bits, int row) {
  __m256 values = floats_of_eight<T>(slot, row);
  asm("" : "+x"(values));  // not a load in the permutation, which takes twice as long on Zen 3
  slot += __builtin_popcount(bits);
  const __m256i places = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPlaces.of[bits])));
  const __m256 spread = _mm256_permutevar8x32_ps(values, places), mask = _mm256_castsi256_ps(places);
  // The lower half of a bfloat16 is zero, so that the lowest bits of the mask do not matter.
  return std::is_same_v<T, BFloat16> ? _mm256_and_ps(spread, mask) : _mm256_blendv_ps(_mm256_setzero_ps(), spread, mask);
}

template <class T, int kTokens>
SPARSEKERN_AVX2 bool multiply_avx2(const Factors& factors, Group* group) {
  constexpr int kRows = kTokens > 4 ? 1 : kSlotValues<T>;                    // the sums of one row more would not fit the registers
  constexpr int kChains = kTokens * kRows >= 4 ? 1 : 4 / (kTokens * kRows);  // hide the latency of the multiply-adds
  const auto [last, words, first_x, x_stride] = factors;
  const Slot* end = group->slots;
  for (int first = 0; first < kSlotValues<T>; first += kRows) {
    __m256 sums[kRows][kTokens][kChains];
    const Slot* slot[kRows];
    const uint64_t* bits[kRows];
#pragma GCC unroll 2
    for (int row = 0; row < kRows; ++row) {
      slot[row] = group->slots;
      bits[row] = group->bits[first + row];
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
#pragma GCC unroll 4
        for (int chain = 0; chain < kChains; ++chain) sums[row][token][chain] = _mm256_setzero_ps();
      }
    }
    for (int64_t word = 0; word < words; ++word) {
      for (int row = 0; row < kRows; ++row) {
        if (__builtin_expect(slot[row] > last, 0)) return false;
        prefetch_ahead(slot[0] + 16 * row);
      }
#pragma GCC unroll 8
      for (int part = 0; part < 8; ++part) {
        const float* x = first_x + word * packed_rows::kWordColumns + part * 8;
        __m256 weight[kRows];
#pragma GCC unroll 2
        for (int row = 0; row < kRows; ++row) {
          weight[row] = next_weights<T>(slot[row], reinterpret_cast<const uint8_t*>(bits[row] + word)[part], first + row);
        }
#pragma GCC unroll 8
        for (int token = 0; token < kTokens; ++token) {
          const __m256 features = _mm256_loadu_ps(x + token * x_stride);
#pragma GCC unroll 2
          for (int row = 0; row < kRows; ++row) {
            __m256& sum = sums[row][token][part % kChains];
            sum = _mm256_fmadd_ps(weight[row], features, sum);
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int row = 0; row < kRows; ++row) {
      end = std::max(end, slot[row]);
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        __m256 sum = sums[row][token][0];
        for (int chain = 1; chain < kChains; ++chain) sum = _mm256_add_ps(sum, sums[row][token][chain]);
        group->sums[token * packed_rows::kTileRows + first + row] = add_up(sum);
      }
    }
  }
  group->slots = end;
  return true;
}

#endif

using Multiply = bool (*)(const Factors&, Group*);

template <Multiply kOne>
bool one_by_one(const Factors& factors, Group* groups) {
  return kOne(factors, groups) && kOne(factors, groups + 1);
}

template <class T, int kTokens>
ByStreams<Multiply> choose_multiply([[maybe_unused]] Isa isa) {
#if SPARSEKERN_X86
  if (isa >= Isa::avx512) {
    constexpr Multiply one = &multiply_avx512<T, kTokens, 1>;
    if constexpr (kTokens > 4)
      return {one, &one_by_one<one>};  // two streams would not fit the registers
    else
      return {one, &multiply_avx512<T, kTokens, 2>};
  }
  if (isa >= Isa::avx2) return {&multiply_avx2<T, kTokens>, &one_by_one<&multiply_avx2<T, kTokens>>};
#endif
  return {&multiply_scalar<T, kTokens>, &one_by_one<&multiply_scalar<T, kTokens>>};
}

}  // namespace sparsekern::cpu::bitmask_multiply
