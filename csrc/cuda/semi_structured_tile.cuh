// Distribution of a weight over threads for semi_structured_pack, semi_structured_prune_pack and semi_structured_unpack. Every
// access fills its 32-byte sectors although the metadata words are permuted (common/semi_structured.h).
//
// A warp handles the same 512 bytes of several rows. A lane handles the same 16 bytes, a chunk, in each: two groups of 16-bit
// weights or float32, four of int8. Four chunks of a row are two metadata words. The words of two columns of words and of rows r, r
// + 8, r + 16, ... of a block are stored side by side: 16 bytes, the codes that four lanes hold of a set of rows. Together with the
// set of r + 1 they fill a sector, which the four lanes exchange and write at once. Four warps handle a block of rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/semi_structured_group.h"

namespace sparsekern::cuda {

constexpr int kTileWarps = 4, kTileThreads = 32 * kTileWarps;
constexpr int kChunkBytes = 16, kChunksPerTile = 32;

template <class K>
struct NmTile {
  using Word = typename K::word;
  static constexpr int kBlock = K::format.row_multiple;
  static constexpr int kSets = 2, kRowsPerSet = kBlock / 8, kRows = kSets * kRowsPerSet;  // sets and rows of a lane
  static constexpr int kGroups = kChunkBytes / static_cast<int>(sizeof(typename K::group));
  static constexpr int kCodeBits = 4 * kGroups;  // code bits of a chunk
  static_assert(kRowsPerSet * kCodeBits == 32, "a lane's codes of a set fill a register");
  static_assert(kBlock == kTileWarps * kRows, "the warps of a tile have a block of rows");

  int64_t rows, chunks;  // rows of the weight, chunks of a row
  int64_t first_row, chunk;
  int lane;

  // Consecutive tiles go along the rows.
  __device__ NmTile(int64_t rows, int64_t chunks) : rows(rows), chunks(chunks), lane(static_cast<int>(threadIdx.x) % 32) {
    const auto across = static_cast<unsigned>((chunks + kChunksPerTile - 1) / kChunksPerTile);
    const unsigned block = blockIdx.x / across;  // a 64-bit division would cost as much as packing ten weights
    chunk = int64_t{blockIdx.x - block * across} * kChunksPerTile + lane;
    first_row = int64_t{block} * kBlock + kSets * (threadIdx.x / 32);
  }

  // Returns whether the lane has weights; the four lanes of an exchange agree.
  __device__ bool exists() const { return chunk < chunks; }

  // Returns the index of chunk `i` of the lane's kRows among the chunks of the weight: row `i % kRowsPerSet` of set `i /
  // kRowsPerSet`.
  __device__ int64_t at(int i) const { return (first_row + i / kRowsPerSet + i % kRowsPerSet * 8) * chunks + chunk; }

  // Writes the codes of a lane. A set's codes are those of its rows in order; a lane's share of the sector is 8 bytes.
  __device__ void write_codes(const uint32_t (&codes)[kSets], Word* meta) const {
    const uint32_t first = to_words(codes[0]), second = to_words(codes[1]);
    const uint32_t got = __shfl_xor_sync(0xffffffffu, takes_second() ? first : second, kExchange);
    if (exists()) *share(meta) = takes_second() ? make_uint2(got, second) : make_uint2(first, got);
  }

  __device__ void read_codes(const Word* meta, uint32_t (&codes)[kSets]) const {
    const uint2 words = exists() ? *share(meta) : make_uint2(0, 0);
    const uint32_t got = __shfl_xor_sync(0xffffffffu, takes_second() ? words.x : words.y, kExchange);
    codes[0] = from_words(takes_second() ? got : words.x);
    codes[1] = from_words(takes_second() ? words.y : got);
  }

 private:
  // 16-bit words are stored as rows 0 | 1 of word column 0, then of word column 1, then rows 2 | 3; 32-bit words row by row.
  static constexpr bool kLong = sizeof(Word) == 4;
  // Distance to the lane that holds the other half of what this one writes of a set.
  static constexpr int kExchange = kLong ? 1 : 2;

  __device__ bool takes_second() const { return (lane & kExchange) != 0; }

  template <class Pointer>
  __device__ auto share(Pointer meta) const {
    using Vector = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const uint2, uint2>;
    const int place = 2 * takes_second() + ((lane & (3 ^ kExchange)) != 0);
    return reinterpret_cast<Vector*>(meta + semi_structured::word_offset(first_row, chunk / 4 * 2, rows, kBlock)) + place;
  }

  // Of two lanes, the even one has the low half of each word, the odd one the high half. Afterwards the even one has the words of
  // the first half of the rows, the odd one those of the second half.
  __device__ uint32_t to_words(uint32_t codes) const {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, codes, 1);
    return lane % 2 == 0 ? __byte_perm(codes, other, kLong ? 0x5410 : 0x5140) : __byte_perm(other, codes, kLong ? 0x7632 : 0x7362);
  }
  __device__ uint32_t from_words(uint32_t words) const {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, words, 1);
    return lane % 2 == 0 ? __byte_perm(words, other, kLong ? 0x5410 : 0x6420) : __byte_perm(other, words, kLong ? 0x7632 : 0x7531);
  }
};

template <class K>
int64_t nm_chunks(int64_t columns) {
  return columns * static_cast<int64_t>(sizeof(typename K::element)) / kChunkBytes;
}

// One block per tile.
template <class K>
dim3 nm_grid(int64_t rows, int64_t columns) {
  const int64_t across = (nm_chunks<K>(columns) + kChunksPerTile - 1) / kChunksPerTile;
  return dim3(static_cast<unsigned>(rows / K::format.row_multiple * across));
}

}  // namespace sparsekern::cuda
