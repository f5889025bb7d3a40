// semi_structured_prune_pack: select, zero and pack a weight in one pass.
//
// Floor: one read of the weight, and of the scores unless they are its own magnitudes; one write of half the weight and of the
// metadata. That is 3.125 bytes per 16-bit weight without scores. At 4.3 TB/s an SM of an H200 has 11 integer instructions for
// each; this takes 9. Magnitudes of 16-bit weights are compared in the planes of cuda/semi_structured_chunk.cuh, the six pairs of
// two groups by six subtractions. Scores are compared as floats, one pair at a time (cuda/rank_groups.cuh). That takes 13
// instructions, but scores add 2 or 4 bytes, the time of 7 or 14 instructions. cuda/semi_structured_tile.cuh assigns the weight to
// threads.
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/rank_groups.cuh"
#include "cuda/semi_structured_chunk.cuh"
#include "cuda/semi_structured_tile.cuh"

namespace sparsekern::cuda {

namespace {

template <class T>
using KindOf = std::conditional_t<
    std::is_same_v<T, float>, semi_structured::F32,
    std::conditional_t<std::is_same_v<T, Half>, semi_structured::F16, semi_structured::Bf16>>;

// Corrects the codes of kept zeros: semi_structured_pack derives codes from the positions of non-zeros. Rarely called.
template <class K>
__device__ __noinline__ PackedChunk repack(uint4 chunk, const Planes<K> kept) {
  // Lane `i` of a plane is group `i`; elements 2 * j and 2 * j + 1 of a group are a word.
  uint32_t masks[4];
  for (int j = 0; j < 4; ++j) masks[j] = (kept.element[j] >> 15 & 0x00010001u) * 0xffffu;
  chunk.x &= __byte_perm(masks[0], masks[1], 0x5410);
  chunk.y &= __byte_perm(masks[2], masks[3], 0x5410);
  chunk.z &= __byte_perm(masks[0], masks[1], 0x7632);
  chunk.w &= __byte_perm(masks[2], masks[3], 0x7632);
  int refused = 0;  // always fits: two of each group are left
  return pack_chunk<K>(chunk, refused);
}

// Packs the two `kept` elements of each group of 16-bit weights.
template <class K>
__device__ __forceinline__ PackedChunk pack_kept(const uint4& chunk, const Planes<K>& kept) {
  const PackedChunk packed = take<K>(chunk, encode<K>(kept.element));
  const uint32_t all_nonzero = is_nonzero<K>(packed.values.x) & is_nonzero<K>(packed.values.y) & kTops<K>;
  return all_nonzero == kTops<K> ? packed : repack<K>(chunk, kept);
}

// Packs the kept element of each pair of float32 weights; a kept zero has the code of the second position.
__device__ __forceinline__ PackedChunk pack_kept(const uint4& chunk, bool first_of_low, bool first_of_high) {
  const uint32_t x = first_of_low ? chunk.x : 0, y = first_of_low ? 0 : chunk.y;
  const uint32_t z = first_of_high ? chunk.z : 0, w = first_of_high ? 0 : chunk.w;
  int refused = 0;
  return pack_chunk<semi_structured::F32>(make_uint4(x, y, z, w), refused);
}

struct ByMagnitude {};

template <class K>
__device__ __forceinline__ PackedChunk prune_chunk(const uint4& chunk, ByMagnitude, bool& nan) {
  nan |= has_nan<K>(chunk);
  if constexpr (K::bits == 32) {
    return pack_kept(chunk, (chunk.x & 0x7fffffffu) >= (chunk.y & 0x7fffffffu), (chunk.z & 0x7fffffffu) >= (chunk.w & 0x7fffffffu));
  } else {
    Planes<K> planes = planes_of<K>(chunk);
    const uint32_t m0 = planes.element[0] & kMagnitudes<K>, m1 = planes.element[1] & kMagnitudes<K>;
    const uint32_t m2 = planes.element[2] & kMagnitudes<K>, m3 = planes.element[3] & kMagnitudes<K>;
    // The top bit of (a + 0x8000) - b says whether a >= b: the earlier of equal ones wins. An element is kept if it wins two of
    // three comparisons.
    constexpr uint32_t top = kTops<K>;
    const uint32_t w01 = (m0 | top) - m1, w02 = (m0 | top) - m2, w03 = (m0 | top) - m3;
    const uint32_t w12 = (m1 | top) - m2, w13 = (m1 | top) - m3, w23 = (m2 | top) - m3;
    const Planes<K> kept = {{two_of(w01, w02, w03), two_of(~w01, w12, w13), two_of(~w02, ~w12, w23), two_of(~w03, ~w13, ~w23)}};
    return pack_kept<K>(chunk, kept);
  }
}

template <class K, class Score, int kScores>
__device__ __forceinline__ PackedChunk prune_chunk(const uint4& chunk, const ScoreWords<Score, kScores>& words, bool& nan) {
  nan |= has_nan<K>(chunk);
  float scores[kScores];
  nan |= to_floats(words, scores);
  if constexpr (K::bits == 32) {
    return pack_kept(chunk, scores[0] >= scores[1], scores[2] >= scores[3]);
  } else {
    uint32_t ranks[kRankWords<kScores>];
    rank_groups<4>(scores, ranks);
    // Ranks 0 and 1 have a zero in the bit of value 2. The ranks of the second group are 16 bits above those of the first.
    const uint32_t kept = ~ranks[0];
    return pack_kept<K>(chunk, Planes<K>{{kept << 14, kept << 10, kept << 6, kept << 2}});
  }
}

// The scores as a kernel argument.
template <class Score>
struct ByScore {
  const Score* scores;
};

template <class T, class Score>
__device__ __forceinline__ auto read_scores(ByScore<Score> by, int64_t chunk, bool exists) {
  constexpr int kScores = kChunkBytes / static_cast<int>(sizeof(T));
  ScoreWords<Score, kScores> words = {};
  if (exists) words.read(by.scores + chunk * kScores);
  return words;
}
template <class T>
__device__ __forceinline__ ByMagnitude read_scores(ByMagnitude, int64_t, bool) {
  return {};
}

template <class T, class By>
__global__ void __launch_bounds__(kTileThreads) prune_pack(
    const uint4* __restrict__ weight, By by, int64_t rows, int64_t chunks, uint2* __restrict__ values,
    typename KindOf<T>::word* __restrict__ meta, int* status) {
  using K = KindOf<T>;
  using Tile = NmTile<K>;
  const Tile tile(rows, chunks);
  uint32_t codes[Tile::kSets] = {};
  bool nan = false;
#pragma unroll
  for (int set = 0; set < Tile::kSets; ++set) {
    uint4 loaded[Tile::kRowsPerSet];
    decltype(read_scores<T>(by, 0, true)) scores[Tile::kRowsPerSet];
#pragma unroll
    for (int i = 0; i < Tile::kRowsPerSet; ++i) {
      const int64_t at = tile.at(set * Tile::kRowsPerSet + i);
      loaded[i] = tile.exists() ? weight[at] : make_uint4(0, 0, 0, 0);
      scores[i] = read_scores<T>(by, at, tile.exists());
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowsPerSet; ++i) {
      const PackedChunk packed = prune_chunk<K>(loaded[i], scores[i], nan);
      codes[set] |= packed.codes << i * Tile::kCodeBits;
      if (tile.exists()) values[tile.at(set * Tile::kRowsPerSet + i)] = packed.values;
    }
  }
  tile.write_codes(codes, meta);
  if (nan) atomicOr(status, static_cast<int>(kNotFinite));
}

template <class T, class By>
void prune_pack_by(
    const void* weight, By by, int64_t rows, int64_t columns, void* values, void* meta, int* status, cudaStream_t stream) {
  using K = KindOf<T>;
  launch(
      prune_pack<T, By>, nm_grid<K>(rows, columns), dim3(kTileThreads), stream, static_cast<const uint4*>(weight), by, rows,
      nm_chunks<K>(columns), static_cast<uint2*>(values), static_cast<typename K::word*>(meta), status);
}

}  // namespace

void semi_structured_prune_pack(
    const void* weight, DType dtype, const void* scores, DType scores_dtype, int64_t rows, int64_t columns, void* values,
    void* meta, int* status, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return;
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (scores == nullptr) return prune_pack_by<T>(weight, ByMagnitude{}, rows, columns, values, meta, status, stream);
    dispatch_dtype(scores_dtype, [&](auto* score_type) {
      const ByScore<std::remove_pointer_t<decltype(score_type)>> by{static_cast<decltype(by.scores)>(scores)};
      prune_pack_by<T>(weight, by, rows, columns, values, meta, status, stream);
    });
  });
}

}  // namespace sparsekern::cuda
