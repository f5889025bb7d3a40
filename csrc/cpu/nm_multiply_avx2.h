// Kernels of nm_linear for AVX2, up to kTogether tokens.
//
// A gather of AVX2 fetches about one value a cycle. So eight rows are multiplied together: lane i of a register belongs to row i, and
// value k of all rows comes from the same group of columns. The group is one load of x, and the positions pick from it: vpermilps for M
// up to 4, which looks at the two lowest bits only, vpermps for M up to 8, which looks at three, and two of these beyond. What
// lies above a position needs no mask, and no position leads out of the group.
//
// For one token and 16-bit values, a step of eight values takes the shift of the positions, the load and the pick of x, the shift to a
// float, the multiply-add, and a share of the loads and transpositions of slots and positions: 7.5 instructions, and nothing is added up
// at the end of a row. That is 0.47 a weight of 2:4, 0.43 of 4:8, 0.25 of 1:4, and 0.55 of 2:4 in float32, whose slots hold half as many
// values to transpose. A Zen 3 at 3.24 GHz does 18 G weights of 2:4 a second on a core in the cache, which are 20 GB/s, and 12 G from
// memory. Prefetching the rows, or the next eight, made 2:4 slower.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/eight_rows.h"
#include "cpu/packed_linear.h"
#include "cpu/slot_floats.h"

#if SPARSEKERN_X86

namespace sparsekern::cpu::nm_multiply {

// Eight rows of the weight, and a few tokens to multiply by them.
struct EightRows {
  const packed_rows::Slot* slots;  // of the first row
  const uint32_t* codes;
  int64_t slots_a_row, codes_a_row;  // 0: the same row eight times
  int64_t blocks;                    // of a row
  const int32_t* group_columns;      // the first column of the group of each value
  const float* x;                    // the first token
  int64_t x_stride;
};

using MultiplyEight = void (*)(const EightRows& rows, float* sums);  // stores sums[token * kTileRows + row]

// Returns x at eight positions in a group of up to kMost columns.
template <int kMost>
SPARSEKERN_AVX2 SPARSEKERN_INLINE __m256 pick(const float* x, __m256i positions) {
  if constexpr (kMost == 4) {
    return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(x)), positions);
  } else if constexpr (kMost == 8) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), positions);
  } else {
    const __m256 low = pick<8>(x, positions), high = pick<8>(x + 8, positions);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(positions, 28)));
  }
}

// kGroup: N, where it is known and groups have kMost columns; 0: places come from group_columns.
template <class T, int kTokens, int kGroup, int kMost>
SPARSEKERN_AVX2 void multiply_eight_avx2(const EightRows& rows, float* sums) {
  constexpr int kBits = static_cast<int>(packed_rows::code_bits(kMost)), kLanesOfSlot = kSlotValues<T>;
  constexpr int kValues = static_cast<int>(packed_rows::kBlockSlots) * kLanesOfSlot, kWords = kValues * kBits / 32;
  constexpr int kGroupValues = kGroup == 0 ? kValues : kGroup;
  constexpr int kChains = kTokens == 1 ? 4 : kTokens == 2 ? 2 : 1;  // hide the latency of the multiply-adds
  __m256 total[kTokens][kChains];
#pragma GCC unroll 8
  for (int token = 0; token < kTokens; ++token) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) total[token][chain] = _mm256_setzero_ps();
  }
  auto [slots, codes, slots_a_row, codes_a_row, blocks, columns, x, x_stride] = rows;
  for (int64_t block = 0; block < blocks; ++block) {
    __m256i words[kWords];
    load_eight_rows(codes, codes_a_row, words);
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; ++quarter) {
      __m256i four[4];
      load_eight_rows(slots + quarter * 4, slots_a_row, four);
#pragma GCC unroll 2
      for (int which = 0; which < kLanesOfSlot; ++which) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const int k = which * static_cast<int>(packed_rows::kBlockSlots) + quarter * 4 + i;
          const __m256i positions = _mm256_srli_epi32(words[k * kBits / 32], k * kBits % 32);
          const __m256 weight = floats_of_slots<T>(four[i], which);
          const float* group = kGroup == 0 ? x + columns[k] : x + k / kGroupValues * kMost;
#pragma GCC unroll 8
          for (int token = 0; token < kTokens; ++token) {
            __m256& sum = total[token][i % kChains];
            sum = _mm256_fmadd_ps(weight, pick<kMost>(group + token * x_stride, positions), sum);
          }
        }
      }
    }
    slots += packed_rows::kBlockSlots;
    codes += kWords;
    if constexpr (kGroup == 0) {
      columns += kValues;
    } else {
      x += kValues / kGroup * kMost;
    }
  }
#pragma GCC unroll 8
  for (int token = 0; token < kTokens; ++token) {
    __m256 sum = total[token][0];
    if constexpr (kChains == 2) sum = _mm256_add_ps(sum, total[token][1]);
    if constexpr (kChains == 4)
      sum = _mm256_add_ps(_mm256_add_ps(sum, total[token][1]), _mm256_add_ps(total[token][2], total[token][3]));
    _mm256_storeu_ps(sums + token * packed_rows::kTileRows, sum);
  }
}

template <class T, int kTokens>
MultiplyEight choose_multiply_eight(int64_t n, int64_t m) {
  if (n == 2 && m == 4) return &multiply_eight_avx2<T, kTokens, 2, 4>;
  if (n == 1 && m == 4) return &multiply_eight_avx2<T, kTokens, 1, 4>;
  if (n == 4 && m == 8) return &multiply_eight_avx2<T, kTokens, 4, 8>;
  if (m <= 4) return &multiply_eight_avx2<T, kTokens, 0, 4>;
  if (m <= 8) return &multiply_eight_avx2<T, kTokens, 0, 8>;
  return &multiply_eight_avx2<T, kTokens, 0, 16>;
}

}  // namespace sparsekern::cpu::nm_multiply

#endif
