// The values of slots (common/packed_rows.h) as floats, one by one or a register at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "common/packed_rows.h"
#include "cpu/isa.h"

#if SPARSEKERN_X86
#include <immintrin.h>
#endif

namespace sparsekern::cpu {

template <class T>
constexpr int kSlotValues = 4 / sizeof(T);

// Distance at which packed data is prefetched: far enough for the memory to answer. The hardware prefetcher stops at page
// boundaries.
constexpr int64_t kPrefetchBytes = 4096;

SPARSEKERN_INLINE void prefetch_ahead(const void* p, int64_t bytes = kPrefetchBytes) {
  __builtin_prefetch(static_cast<const char*>(p) + bytes);
}

template <class T>
SPARSEKERN_INLINE float value_of(const packed_rows::Slot* slot, int which) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(slot) + which * sizeof(T), sizeof(T));
  return to_float(value);
}

#if SPARSEKERN_X86

// Returns value `which` of each slot. A bfloat16 in the upper half of a slot becomes a float by clearing the lower half.
template <class T>
SPARSEKERN_AVX512 SPARSEKERN_INLINE __m512 floats_of_slots(__m512i slots, int which) {
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_castsi512_ps(slots);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const auto bits = which == 0 ? (__v16su)slots << 16 : (__v16su)slots & 0xffff0000u;
    return _mm512_castsi512_ps((__m512i)bits);
  } else {
    const auto bits = which == 0 ? (__v16su)slots & 0xffffu : (__v16su)slots >> 16;
    // GCC 12 warns that the unmasked intrinsics leave values uninitialised.
    return _mm512_maskz_cvtph_ps(0xffff, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits));
  }
}

template <class T>
SPARSEKERN_AVX2 SPARSEKERN_INLINE __m256 floats_of_slots(__m256i slots, int which) {
  if constexpr (std::is_same_v<T, float>) {
    return _mm256_castsi256_ps(slots);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const auto bits = which == 0 ? (__v8su)slots << 16 : (__v8su)slots & 0xffff0000u;
    return _mm256_castsi256_ps((__m256i)bits);
  } else {
    const auto bits = (__m256i)(which == 0 ? (__v8su)slots & 0xffffu : (__v8su)slots >> 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
  }
}

SPARSEKERN_AVX2 SPARSEKERN_INLINE float add_up(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

SPARSEKERN_AVX512 SPARSEKERN_INLINE float add_up(__m512 v) {
  __m256 halves[2];
  std::memcpy(halves, &v, sizeof v);
  return add_up(_mm256_add_ps(halves[0], halves[1]));
}

#endif

}  // namespace sparsekern::cpu
