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

// For each byte of bits, the places of the bytes of 8 weights in two loads of 4 slots, those of columns 0 to 3 and of columns 4 to 7. A
// byte with its highest bit set becomes zero. Takes kBytes of a slot, from byte kFirst on, to the upper end of each weight.
struct Shuffles {
  alignas(32) uint8_t of[256][32];
};

template <int kFirst, int kBytes>
constexpr Shuffles make_shuffles() {
  Shuffles shuffles{};
  for (int bits = 0; bits < 256; ++bits) {
    int next = 0;
    for (int column = 0; column < 8; ++column) {
      if (column == 4) next = 0;
      const bool here = bits >> column & 1;
      for (int byte = 0; byte < 4; ++byte) {
        const int from = byte - (4 - kBytes);
        shuffles.of[bits][4 * column + byte] = static_cast<uint8_t>(here && from >= 0 ? 4 * next + kFirst + from : 0x80);
      }
      next += here;
    }
  }
  return shuffles;
}

template <int kFirst, int kBytes>
constexpr Shuffles kShuffles = make_shuffles<kFirst, kBytes>();

// Returns 8 weights of a row, zeros included, and advances `slot` past their values.
template <class T>
SPARSEKERN_AVX2 SPARSEKERN_INLINE __m256 next_weights(const Slot*& slot, uint8_t bits, int row) {
  const Slot* upper = slot + __builtin_popcount(bits & 15);
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(slot));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(upper));
  const __m256i slots = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  slot += __builtin_popcount(bits);
  const Shuffles& shuffles = !std::is_same_v<T, BFloat16> ? kShuffles<0, 4> : row == 0 ? kShuffles<0, 2> : kShuffles<2, 2>;
  const __m256i spread = _mm256_shuffle_epi8(slots, _mm256_load_si256(reinterpret_cast<const __m256i*>(shuffles.of[bits])));
  // A bfloat16 in the upper half of a float is that float.
  return std::is_same_v<T, BFloat16> ? _mm256_castsi256_ps(spread) : floats_of_slots<T>(spread, row);
}

template <class T, int kTokens>
SPARSEKERN_AVX2 bool multiply_avx2(const Factors& factors, Group* group) {
  __m256 sums[kSlotValues<T>][kTokens];
  const Slot* slot[kSlotValues<T>];
  for (int row = 0; row < kSlotValues<T>; ++row) {
    slot[row] = group->slots;
    for (int token = 0; token < kTokens; ++token) sums[row][token] = _mm256_setzero_ps();
  }
  for (int64_t word = 0; word < factors.words; ++word) {
    for (int row = 0; row < kSlotValues<T>; ++row) {
      if (__builtin_expect(slot[row] > factors.last, 0)) return false;
      prefetch_ahead(slot[0] + 16 * row);
    }
    for (int part = 0; part < 8; ++part) {
      const float* x = factors.x + word * packed_rows::kWordColumns + part * 8;
      __m256 weight[kSlotValues<T>];
      for (int row = 0; row < kSlotValues<T>; ++row) {
        weight[row] = next_weights<T>(slot[row], reinterpret_cast<const uint8_t*>(group->bits[row] + word)[part], row);
      }
      for (int token = 0; token < kTokens; ++token) {
        const __m256 features = _mm256_loadu_ps(x + token * factors.x_stride);
        for (int row = 0; row < kSlotValues<T>; ++row) sums[row][token] = _mm256_fmadd_ps(weight[row], features, sums[row][token]);
      }
    }
  }
  for (int row = 0; row < kSlotValues<T>; ++row) {
    group->slots = std::max(group->slots, slot[row]);
    for (int token = 0; token < kTokens; ++token) group->sums[token * packed_rows::kTileRows + row] = add_up(sums[row][token]);
  }
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
