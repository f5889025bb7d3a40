// Ranks of scores within their group, in registers, for nm_mask and semi_structured_prune_pack.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace sparsekern::cuda {

// Consecutive scores as loaded: 8, 16 or more bytes, aligned to their size.
template <class T, int kScores>
struct ScoreWords {
  static constexpr int kWords = kScores * static_cast<int>(sizeof(T)) / 4;
  uint32_t words[kWords];

  __device__ void read(const T* scores) {
    if constexpr (kWords == 2) {
      const uint2 vector = *reinterpret_cast<const uint2*>(scores);
      words[0] = vector.x;
      words[1] = vector.y;
    } else {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 vector = reinterpret_cast<const uint4*>(scores)[i];
        words[4 * i] = vector.x;
        words[4 * i + 1] = vector.y;
        words[4 * i + 2] = vector.z;
        words[4 * i + 3] = vector.w;
      }
    }
  }
};

// Returns whether a score is NaN.
template <class T, int kScores>
__device__ __forceinline__ bool to_floats(const ScoreWords<T, kScores>& from, float (&scores)[kScores]) {
  bool nan = false;
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    if constexpr (sizeof(T) == 4) {
      scores[i] = bits_to_float(from.words[i]);
    } else {
      scores[i] = to_float(T{static_cast<uint16_t>(from.words[i / 2] >> 16 * (i % 2))});
    }
    nan |= scores[i] != scores[i];
  }
  return nan;
}

// Ranks are fields of 4 bits, 8 in a word.
constexpr int kRanksPerWord = 8;
template <int kScores>
constexpr int kRankWords = (kScores + kRanksPerWord - 1) / kRanksPerWord;

// Computes the rank of each score within its group of M: 0 is the largest, and of equal ones the lower column ranks first. Every
// pair is compared once. The ranks begin as if the later of each pair had won; if the earlier one has, one addition moves a rank
// from it to the later one. Fields may overflow on the way; at the end each is less than M.
template <int M, int kScores>
__device__ __forceinline__ void rank_groups(const float (&scores)[kScores], uint32_t (&ranks)[kRankWords<kScores>]) {
  static_assert(kScores % M == 0 && M <= 16, "whole groups, whose ranks fit 4 bits");
#pragma unroll
  for (int word = 0; word < kRankWords<kScores>; ++word) ranks[word] = 0;
#pragma unroll
  for (int i = 0; i < kScores; ++i) ranks[i / kRanksPerWord] += static_cast<uint32_t>(M - 1 - i % M) << 4 * (i % kRanksPerWord);
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
#pragma unroll
    for (int j = i + 1; j < i / M * M + M; ++j) {
      const uint32_t of_earlier = 1u << 4 * (i % kRanksPerWord), of_later = 1u << 4 * (j % kRanksPerWord);
      const bool earlier_wins = scores[i] >= scores[j];
      if (i / kRanksPerWord == j / kRanksPerWord) {
        ranks[i / kRanksPerWord] += earlier_wins ? of_later - of_earlier : 0u;
      } else {
        ranks[i / kRanksPerWord] -= earlier_wins ? of_earlier : 0u;
        ranks[j / kRanksPerWord] += earlier_wins ? of_later : 0u;
      }
    }
  }
}

}  // namespace sparsekern::cuda
