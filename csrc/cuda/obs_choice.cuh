// Selection of masks for obs_sweep that needs more than one lane: the best of each row, of all rows, and of groups of any size.
#pragma once

#include <climits>

#include "cuda/obs_recurrence.cuh"
#include "cuda/select.cuh"

namespace sparsekern::cuda {

// A lane's scores as integers in the same order; -1 past its row's width.
template <int kWidth>
struct Keys {
  using L = Layout<kWidth>;
  static constexpr int kCount = L::kChunks * kWidth;
  Owned<int, kWidth> key;

  __device__ __forceinline__ Keys(const Triangle<kWidth>& triangle, const Columns<kWidth>& columns, int row_width) {
#pragma unroll
    for (int c = 0; c < L::kChunks; ++c) {
      float diagonal[kWidth];
      load_shared(triangle.diagonal + L::column(c), diagonal);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        key[c][i] = L::column(c) + i < row_width ? __float_as_int(columns.score(c, i, diagonal[i])) : -1;
      }
    }
  }
  __device__ __forceinline__ Keys(const int* from, int stride) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) key[i / kWidth][i % kWidth] = from[i * stride];
  }
  __device__ __forceinline__ void store(int* to, int stride) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i * stride] = key[i / kWidth][i % kWidth];
  }
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) f(key[i / kWidth][i % kWidth]);
  }
};

// Returns the sum over the lanes of a row.
template <class T>
__device__ __forceinline__ T sum_of_row(T value) {
#pragma unroll
  for (int bit = kRowsPerWarp; bit < kWarp; bit *= 2) value += __shfl_xor_sync(kWholeWarp, value, bit);
  return value;
}

// Returns the bits of the keys above the threshold, and of the first `ties` of the row's keys equal to it.
template <int kWidth>
__device__ __forceinline__ unsigned above(const Keys<kWidth>& keys, int threshold, int ties) {
  unsigned bits = 0;
#pragma unroll
  for (int c = 0; c < Layout<kWidth>::kChunks; ++c) {
    int equal = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) equal += keys.key[c][i] == threshold ? 1 : 0;
    int before = 0;  // equal keys in the lanes to the left, then also in this lane
    int total = 0;
#pragma unroll
    for (int place = 0; place < kLanesPerRow; ++place) {
      const int theirs = __shfl_sync(kWholeWarp, equal, lane_at(place));
      before += place < place_of_lane() ? theirs : 0;
      total += theirs;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const bool tie = keys.key[c][i] == threshold;
      bits |= (keys.key[c][i] > threshold || (tie && before < ties) ? 1u : 0u) << (c * kWidth + i);
      before += tie ? 1 : 0;
    }
    ties -= total;
  }
  return bits;
}

// Returns the bits of the `kept` largest keys of each row. The threshold is found bit by bit, for all rows of the warp at once.
template <int kWidth>
__device__ __forceinline__ unsigned largest_of_row(const Keys<kWidth>& keys, int kept) {
  const auto count = [&](int least) {
    int found = 0;
#pragma unroll
    for (int c = 0; c < Layout<kWidth>::kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) found += keys.key[c][i] >= least ? 1 : 0;
    }
    return sum_of_row(found);
  };
  int threshold = 0;  // the largest number that at least `kept` keys reach
#pragma unroll 1
  for (int bit = 1 << 30; bit != 0; bit >>= 1) {
    if (count(threshold | bit) >= kept) threshold |= bit;
  }
  return above(keys, threshold, kept - (threshold == 0x7fffffff ? 0 : count(threshold + 1)));
}

// Selection over all rows of a cooperative launch: cuda/select.cuh counts the scores.
constexpr int kScoreBits = 31;  // scores are not negative
constexpr int kScoreDigit = 11;
using ScoreSelection = GridSelection<kScoreDigit>;
template <int kThreads>
using ScoreScratch = SelectScratch<kThreads, kScoreDigit, uint64_t>;

// A thread block's cut in terms of keys. If it splits equal scores, the block asks for its rows in order.
struct Ties {
  int threshold, needed;
  bool split;

  Ties() = default;
  __device__ explicit Ties(const Cut& cut)
      : threshold(INT_MAX - static_cast<int>(cut.key)),
        needed(static_cast<int>(min(cut.needed, static_cast<uint32_t>(INT_MAX)))),
        split(cut.splits_ties()) {}

  // Returns how many keys of this row that equal the threshold are kept.
  template <int kThreads, int kWidth, class Count>
  __device__ int of_row(const Keys<kWidth>& keys, ScanScratch<kThreads, Count>& scratch) {
    if (!split) return needed;
    int equal = 0;
    keys.each([&](int key) { equal += key == threshold ? 1 : 0; });
    equal = sum_of_row(equal);
    // The first lane of each row represents it; these lanes are in row order.
    const Scan<Count> scan = block_scan<kThreads>(static_cast<Count>(place_of_lane() == 0 ? equal : 0), scratch);
    const int row = needed - __shfl_sync(kWholeWarp, static_cast<int>(scan.before), row_of_lane());
    needed = max(0, needed - static_cast<int>(scan.total));
    return max(0, row);
  }
};

// Groups of any number of columns up to 64, beginning at any column. The steps are those of run_recurrence, one column at a time
// through shared memory, because registers cannot be indexed at run time.
struct AnyGroups {
  float* taken;         // [kMaxColumns][kRowsPerWarp]: Columns::taken of the four rows of the warp
  float* start;         // Columns::start, likewise
  float* score;         // [kMaxGroup][kRowsPerWarp]: scores of the group
  unsigned char* keep;  // [kMaxColumns][kRowsPerWarp]

  static constexpr int kMaxGroup = 64;
  static constexpr int kFloats = (2 * kMaxColumns + kMaxGroup + kMaxColumns / 4) * kRowsPerWarp;

  __device__ explicit AnyGroups(float* shared)
      : taken(shared),
        start(taken + kMaxColumns * kRowsPerWarp),
        score(start + kMaxColumns * kRowsPerWarp),
        keep(reinterpret_cast<unsigned char*>(score + kMaxGroup * kRowsPerWarp)) {}

  __device__ static int at(int column) { return column * kRowsPerWarp + row_of_lane(); }

  // Fills `score` for the group that begins at `first`: first with what would be taken if all of it were kept, then with the cost
  // of pruning.
  __device__ void score_group(const Triangle<4>& triangle, int first, int group) const {
    for (int j = place_of_lane(); j < group; j += kLanesPerRow) score[at(j)] = taken[at(first + j)];
    __syncwarp();
    for (int k = 0; k < group; ++k) {
      const float theirs = score[at(k)];
      for (int j = k + 1 + place_of_lane(); j < group; j += kLanesPerRow) {
        score[at(j)] = fmaf(theirs, triangle.at(first + k, first + j), score[at(j)]);
      }
      __syncwarp();
    }
    for (int j = place_of_lane(); j < group; j += kLanesPerRow) {
      score[at(j)] = fabsf(start[at(first + j)] - score[at(j)]) * triangle.diagonal[first + j];
    }
    __syncwarp();
  }

  __device__ void choose(int first, int group, int n) const {
    for (int j = place_of_lane(); j < group; j += kLanesPerRow) {
      const float own = score[at(j)];
      int before = 0;
      for (int other = 0; other < group; ++other) {
        const float theirs = score[at(other)];
        before += theirs > own || (theirs == own && other < j) ? 1 : 0;
      }
      keep[at(first + j)] = before < n;
    }
    __syncwarp();
  }

  __device__ void run(const Triangle<4>& triangle, int width, int n, int group, Columns<4>& columns) const {
    using L = Layout<4>;
#pragma unroll
    for (int c = 0; c < L::kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        taken[at(L::column(c) + i)] = columns.taken[c][i];
        start[at(L::column(c) + i)] = columns.start[c][i];
      }
    }
    __syncwarp();
    for (int first = 0; first < width; first += group) {
      score_group(triangle, first, group);
      choose(first, group, n);
      for (int k = first; k < first + group; ++k) {
        const float theirs = keep[at(k)] ? taken[at(k)] : start[at(k)];
        for (int j = k + 1 + place_of_lane(); j < width; j += kLanesPerRow) {
          taken[at(j)] = fmaf(theirs, triangle.at(k, j), taken[at(j)]);
        }
        __syncwarp();
      }
    }
    columns.keep = 0;
#pragma unroll
    for (int c = 0; c < L::kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = L::column(c) + i;
        columns.taken[c][i] = taken[at(column)];
        if (column < width && keep[at(column)]) columns.keep |= 1u << (c * 4 + i);
      }
    }
  }
};

}  // namespace sparsekern::cuda
