// Registers whose lane i belongs to row i of eight rows, for AVX2: words of the rows, loaded and transposed.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

#if SPARSEKERN_X86
#include <immintrin.h>

namespace sparsekern::cpu {

SPARSEKERN_AVX2 SPARSEKERN_INLINE __m256i load_halves(const uint32_t* low, const uint32_t* high) {
  const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
  return _mm256_inserti128_si256(first, _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

// Loads one word of each row.
SPARSEKERN_AVX2 SPARSEKERN_INLINE void load_eight_rows(const uint32_t* first, int64_t stride, __m256i (&words)[1]) {
  int row[8];
  for (int i = 0; i < 8; ++i) row[i] = static_cast<int>(first[i * stride]);
  words[0] = _mm256_setr_epi32(row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7]);
}

// Loads two neighbouring words of each row.
SPARSEKERN_AVX2 SPARSEKERN_INLINE void load_eight_rows(const uint32_t* first, int64_t stride, __m256i (&words)[2]) {
  __m128 pairs[4];  // of rows 0 and 1, 2 and 3, and so on
  for (int i = 0; i < 4; ++i) {
    const auto* row = reinterpret_cast<const __m128i*>(first + 2 * i * stride);
    const auto* next = reinterpret_cast<const __m128i*>(first + (2 * i + 1) * stride);
    pairs[i] = _mm_castsi128_ps(_mm_unpacklo_epi64(_mm_loadl_epi64(row), _mm_loadl_epi64(next)));
  }
  const __m256 even = _mm256_insertf128_ps(_mm256_castps128_ps256(pairs[0]), pairs[2], 1);
  const __m256 odd = _mm256_insertf128_ps(_mm256_castps128_ps256(pairs[1]), pairs[3], 1);
  words[0] = _mm256_castps_si256(_mm256_shuffle_ps(even, odd, 0x88));
  words[1] = _mm256_castps_si256(_mm256_shuffle_ps(even, odd, 0xdd));
}

// Loads four neighbouring words of each row.
SPARSEKERN_AVX2 SPARSEKERN_INLINE void load_eight_rows(const uint32_t* first, int64_t stride, __m256i (&words)[4]) {
  const uint32_t* fifth = first + 4 * stride;
  const __m256i a = load_halves(first, fifth), b = load_halves(first + stride, fifth + stride);
  const __m256i c = load_halves(first + 2 * stride, fifth + 2 * stride), d = load_halves(first + 3 * stride, fifth + 3 * stride);
  const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
  const __m256i ab_high = _mm256_unpackhi_epi32(a, b), cd_high = _mm256_unpackhi_epi32(c, d);
  words[0] = _mm256_unpacklo_epi64(ab, cd);
  words[1] = _mm256_unpackhi_epi64(ab, cd);
  words[2] = _mm256_unpacklo_epi64(ab_high, cd_high);
  words[3] = _mm256_unpackhi_epi64(ab_high, cd_high);
}

}  // namespace sparsekern::cpu

#endif
