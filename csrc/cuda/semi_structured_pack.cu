// semi_structured_pack: packs a 2:4 weight as values and metadata (common/semi_structured.h).
//
// Floor: one read of the weight, one write of half of it and of the metadata, 3.125 bytes per 16-bit weight. At 4.3 TB/s an SM of
// an H200 has 11 integer instructions for each, of which cuda/semi_structured_chunk.cuh takes 8. cuda/semi_structured_tile.cuh
// assigns the weight to threads; a lane reads 8 times 16 bytes, 4 times for int8.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/semi_structured_chunk.cuh"
#include "cuda/semi_structured_tile.cuh"

namespace sparsekern::cuda {

namespace {

template <class K>
__global__ void __launch_bounds__(kTileThreads) pack(
    const uint4* __restrict__ weight, int64_t rows, int64_t chunks, uint2* __restrict__ values, typename K::word* __restrict__ meta,
    int* status) {
  using Tile = NmTile<K>;
  const Tile tile(rows, chunks);
  uint4 loaded[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) loaded[i] = tile.exists() ? weight[tile.at(i)] : make_uint4(0, 0, 0, 0);

  uint32_t codes[Tile::kSets] = {};
  int refused = 0;
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const PackedChunk packed = pack_chunk<K>(loaded[i], refused);
    codes[i / Tile::kRowsPerSet] |= packed.codes << i % Tile::kRowsPerSet * Tile::kCodeBits;
    if (tile.exists()) values[tile.at(i)] = packed.values;
  }
  tile.write_codes(codes, meta);
  if (refused != 0) atomicOr(status, refused);
}

}  // namespace

void semi_structured_pack(
    const void* weight, semi_structured::Type type, int64_t rows, int64_t columns, void* values, void* meta, int* status,
    cudaStream_t stream) {
  if (rows == 0 || columns == 0) return;
  semi_structured::dispatch_type(type, [&](auto kind) {
    using K = decltype(kind);
    launch(
        pack<K>, nm_grid<K>(rows, columns), dim3(kTileThreads), stream, static_cast<const uint4*>(weight), rows,
        nm_chunks<K>(columns), static_cast<uint2*>(values), static_cast<typename K::word*>(meta), status);
  });
}

}  // namespace sparsekern::cuda
