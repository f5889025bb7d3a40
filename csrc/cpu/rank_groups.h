// The N largest of every M consecutive keys, for nm_mask and semi_structured_prune_pack.
//
// Every member of a small group is ranked by comparing all pairs, without branches; of two equal ones the lower column ranks first.
// If M divides the lanes of a register, the register is compared with its own rotations within the groups; otherwise 16 groups are
// ranked side by side, one per lane. Large groups are bisected.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/kth_largest.h"

#if SPARSEKERN_X86
#include <immintrin.h>
#endif

namespace sparsekern::cpu {

constexpr int64_t kRankedLanes = 16;    // lanes of rank_groups
constexpr int64_t kLargestRanked = 11;  // measured: from 12 on, bisection is faster

// Ranks the groups [0, groups) of consecutive keys.
SPARSEKERN_INLINE void rank_groups(const int32_t* keys, int64_t groups, int64_t n, int64_t m, uint8_t* mask) {
  int32_t column[kLargestRanked][kRankedLanes] = {};
  int32_t rank[kLargestRanked][kRankedLanes];
  for (int64_t first = 0; first < groups; first += kRankedLanes) {
    const int64_t lanes = std::min(kRankedLanes, groups - first);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      for (int64_t j = 0; j < m; ++j) column[j][lane] = keys[(first + lane) * m + j];
    }
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t lane = 0; lane < kRankedLanes; ++lane) rank[j][lane] = 0;
    }
    for (int64_t j = 1; j < m; ++j) {
      for (int64_t i = 0; i < j; ++i) {
        for (int64_t lane = 0; lane < kRankedLanes; ++lane) {
          const int32_t later_wins = column[j][lane] > column[i][lane];
          rank[i][lane] += later_wins;
          rank[j][lane] += 1 - later_wins;
        }
      }
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      for (int64_t j = 0; j < m; ++j) mask[(first + lane) * m + j] = rank[j][lane] < n;
    }
  }
}

// Large groups have too many pairs: their N-th largest is found as in a row.
SPARSEKERN_INLINE void bisect_groups(const int32_t* keys, int64_t groups, int64_t n, int64_t m, uint8_t* mask) {
  for (int64_t group = 0; group < groups; ++group, keys += m, mask += m) write_mask(keys, m, kth_largest(keys, m, n), mask);
}

#if SPARSEKERN_X86
// For M of 2, 4 or 8: 8 keys hold whole groups.
template <int M>
SPARSEKERN_AVX2 void rank_in_8_lanes(const int32_t* keys, int64_t groups, int64_t n, int64_t, uint8_t* mask) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i within = _mm256_set1_epi32(M - 1);
  const __m256i kept = _mm256_set1_epi32(static_cast<int>(n));
  const int64_t count = groups * M;
  for (int64_t first = 0; first < count; first += 8) {
    const int64_t valid = std::min<int64_t>(8, count - first);
    const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(valid)), lane);
    const __m256i own = _mm256_maskload_epi32(keys + first, inside);
    __m256i rank = _mm256_setzero_si256();
    for (int rotation = 1; rotation < M; ++rotation) {
      const __m256i rotated = _mm256_and_si256(_mm256_add_epi32(lane, _mm256_set1_epi32(rotation)), within);
      const __m256i partner = _mm256_or_si256(_mm256_andnot_si256(within, lane), rotated);
      const __m256i other = _mm256_permutevar8x32_epi32(own, partner);
      const __m256i wins_tie = _mm256_and_si256(_mm256_cmpgt_epi32(lane, partner), _mm256_cmpeq_epi32(other, own));
      rank = _mm256_sub_epi32(rank, _mm256_or_si256(_mm256_cmpgt_epi32(other, own), wins_tie));
    }
    const auto keep = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(kept, rank))));
    const uint64_t bytes = _pdep_u64(keep, 0x0101010101010101u);
    if (valid == 8) {
      std::memcpy(mask + first, &bytes, 8);
    } else {
      std::memcpy(mask + first, &bytes, static_cast<size_t>(valid));
    }
  }
}

// For M of 2, 4, 8 or 16: 16 keys hold whole groups.
template <int M>
SPARSEKERN_AVX512 void rank_in_16_lanes(const int32_t* keys, int64_t groups, int64_t n, int64_t, uint8_t* mask) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i within = _mm512_set1_epi32(M - 1);
  const __m512i one = _mm512_set1_epi32(1);
  const __m512i kept = _mm512_set1_epi32(static_cast<int>(n));
  const int64_t count = groups * M;
  for (int64_t first = 0; first < count; first += 16) {
    const auto inside = static_cast<__mmask16>(count - first >= 16 ? 0xffff : (1 << (count - first)) - 1);
    const __m512i own = _mm512_maskz_loadu_epi32(inside, keys + first);
    __m512i rank = _mm512_setzero_si512();
    for (int rotation = 1; rotation < M; ++rotation) {
      const __m512i rotated = _mm512_and_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(rotation)), within);
      const __m512i partner = _mm512_or_epi32(_mm512_andnot_epi32(within, lane), rotated);
      const __mmask16 partner_is_lower = _mm512_cmplt_epi32_mask(partner, lane);
      const __m512i other = _mm512_permutexvar_epi32(partner, own);
      const __mmask16 loses = _mm512_cmpgt_epi32_mask(other, own) | _mm512_mask_cmpeq_epi32_mask(partner_is_lower, other, own);
      rank = _mm512_mask_add_epi32(rank, loses, rank, one);
    }
    const __mmask16 keep = _mm512_cmplt_epi32_mask(rank, kept);
    _mm_mask_storeu_epi8(mask + first, inside, _mm_maskz_set1_epi8(keep, 1));
  }
}
#endif

// Marks the `n` largest of each of the `groups` groups of `m` keys, one byte per key.
using Ranker = void (*)(const int32_t*, int64_t, int64_t, int64_t, uint8_t*);

inline Ranker choose_ranker([[maybe_unused]] int64_t m) {
#if SPARSEKERN_X86
  if (current_isa() >= Isa::avx512) {
    if (m == 2) return &rank_in_16_lanes<2>;
    if (m == 4) return &rank_in_16_lanes<4>;
    if (m == 8) return &rank_in_16_lanes<8>;
    if (m == 16) return &rank_in_16_lanes<16>;
  } else if (current_isa() == Isa::avx2) {
    if (m == 2) return &rank_in_8_lanes<2>;
    if (m == 4) return &rank_in_8_lanes<4>;
    if (m == 8) return &rank_in_8_lanes<8>;
  }
#endif
  return m <= kLargestRanked ? Entries<&rank_groups>::choose() : Entries<&bisect_groups>::choose();
}

}  // namespace sparsekern::cpu
