// The recurrence of obs_sweep inside one block of columns.
//
// The block advances by kWidth columns at a time. Every lane computes what is taken from its own columns. In each row, the lane
// whose turn it is shares its values with the other seven by shuffles, and all lanes add the effect to their own columns. There is
// no barrier. Rows share only the triangle of V, which is read as float4.
//
// Chain per four columns: four times a select and a multiply-add, a shuffle, four multiply-adds; about 85 cycles.
// Instructions per four columns of a warp's four rows, by nvcc 13.0 for sm_90: 100, 80, 60 and 40 in the four chunks. Of these 70,
// 54, 38 and 22 are multiply-adds, and 16, 12, 8 and 4 are reads of the triangle. The rows need 32 multiply-adds on average; 46 are
// executed. 2:4 adds 39 to choose.
#pragma once

#include "cuda/obs_columns.cuh"

namespace sparsekern::cuda {

// N of every M weights are kept; kKept = 0 leaves N to the call, and kGroup = 0 leaves the mask to the caller.
template <int kGroup_, int kKept_ = 0>
struct Pattern {
  static constexpr int kGroup = kGroup_, kKept = kKept_;
  static constexpr int kWidth = kGroup == 8 ? 8 : 4;  // columns of a lane: whole groups
};
using NoPattern = Pattern<0>;

// Marks the n largest; of equal ones the first.
template <class P>
__device__ __forceinline__ void choose_largest(const float (&score)[P::kGroup], int n, bool* kept) {
  bool before[P::kGroup][P::kGroup];  // whether i comes before j
#pragma unroll
  for (int j = 1; j < P::kGroup; ++j) {
#pragma unroll
    for (int i = 0; i < j; ++i) {
      before[i][j] = score[i] >= score[j];
      before[j][i] = !before[i][j];
    }
  }
#pragma unroll
  for (int j = 0; j < P::kGroup; ++j) {
    if constexpr (P::kGroup == 4 && P::kKept != 0) {
      // Three-input logic, which is one instruction.
      const bool a = before[(j + 1) % 4][j], b = before[(j + 2) % 4][j], c = before[(j + 3) % 4][j];
      kept[j] = P::kKept == 1 ? !(a | b | c) : P::kKept == 2 ? !((a & b) | (c & (a | b))) : !(a & b & c);
    } else {
      int count = 0;
#pragma unroll
      for (int i = 0; i < P::kGroup; ++i) count += i != j && before[i][j] ? 1 : 0;
      kept[j] = count < (P::kKept != 0 ? P::kKept : n);
    }
  }
}

// Processes a lane's own columns of one chunk, one after the other. On entry `taken` is what all columns before the lane's have
// taken from each. On exit it is what is finally taken: the same if the weight is kept, all of it if it is pruned. With a pattern,
// each group is chosen from the current weights when it is reached.
template <class P, int kWidth>
__device__ __forceinline__ void take_own_columns(
    const float (&start)[kWidth], const float (&own)[kWidth][kWidth], const float (&diagonal)[kWidth], int n, bool (&kept)[kWidth],
    float (&taken)[kWidth]) {
  constexpr int kStep = P::kGroup == 0 ? kWidth : P::kGroup;
#pragma unroll
  for (int first = 0; first < kWidth; first += kStep) {
    if constexpr (P::kGroup != 0) {
      float if_kept[kStep], score[kStep];  // what would be taken from each if all of the group were kept
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        if_kept[i] = taken[first + i];
#pragma unroll
        for (int k = 0; k < i; ++k) if_kept[i] = fmaf(if_kept[k], own[first + k][first + i], if_kept[i]);
        score[i] = fabsf(start[first + i] - if_kept[i]) * diagonal[first + i];
      }
      choose_largest<P>(score, n, kept + first);
    }
#pragma unroll
    for (int k = first; k < first + kStep; ++k) {
      taken[k] = kept[k] ? taken[k] : start[k];
#pragma unroll
      for (int i = k + 1; i < kWidth; ++i) taken[i] = fmaf(taken[k], own[k][i], taken[i]);
    }
  }
}

// Sweeps the first `width` columns. On entry columns.taken is what the columns before the block have taken; on exit, what all
// columns before each have. Without a pattern columns.keep is given, otherwise it is chosen.
template <class P, int kWidth>
__device__ __forceinline__ void run_recurrence(const Triangle<kWidth>& triangle, int width, int n, Columns<kWidth>& columns) {
  using L = Layout<kWidth>;
  const int place = place_of_lane();
  __syncwarp();  // tells the compiler that the warp is converged, so that the shuffles in the loops need no check
  if (P::kGroup != 0) columns.keep = 0;
#pragma unroll
  for (int c = 0; c < L::kChunks; ++c) {
    const float* const rows = triangle.coefficients + L::offset(c) + place * kWidth;
    float own[kWidth][kWidth], diagonal[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) load_shared(rows + (place * kWidth + k) * L::pitch(c), own[k]);
    load_shared(triangle.diagonal + L::column(c), diagonal);
    const int turns = min(kLanesPerRow, (width - c * L::kChunk + kWidth - 1) / kWidth);
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
      float taken[kWidth];
      bool kept[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        taken[i] = columns.taken[c][i];
        kept[i] = columns.kept(c, i);
      }
      take_own_columns<P>(columns.start[c], own, diagonal, n, kept, taken);
      if (P::kGroup != 0 && turn == place) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) columns.keep |= kept[i] ? 1u << (c * kWidth + i) : 0u;
      }
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const float theirs = __shfl_sync(kWholeWarp, taken[k], lane_at(turn));
#pragma unroll
        for (int to = c; to < L::kChunks; ++to) {
          float coefficient[kWidth];
          load_shared(rows + (turn * kWidth + k) * L::pitch(c) + (to - c) * L::kChunk, coefficient);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) columns.taken[to][i] = fmaf(theirs, coefficient[i], columns.taken[to][i]);
        }
      }
    }
  }
}

}  // namespace sparsekern::cuda
