// semi_structured_unpack: unpacks a weight that semi_structured_pack packed.
//
// Floor: one read of the values and of the metadata, one write of the weight, 3.125 bytes per 16-bit weight.
// cuda/semi_structured_tile.cuh assigns the weight to threads; a group is assembled in registers.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/semi_structured_tile.cuh"
#include "cuda/status.h"

namespace sparsekern::cuda {

namespace {

template <class K>
__global__ void __launch_bounds__(kTileThreads) unpack(
    const uint2* __restrict__ values, const typename K::word* __restrict__ meta, int64_t rows, int64_t chunks,
    uint4* __restrict__ weight, int* status) {
  using Tile = NmTile<K>;
  using Stored = typename K::stored;
  constexpr unsigned valid_codes = semi_structured::valid_codes(K::format.group);
  constexpr int kStored = 8 * sizeof(Stored), kGroupWords = sizeof(typename K::group) / 4;
  const Tile tile(rows, chunks);
  uint2 loaded[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) loaded[i] = tile.exists() ? values[tile.at(i)] : make_uint2(0, 0);
  uint32_t codes[Tile::kSets];
  tile.read_codes(meta, codes);
  if (!tile.exists()) return;

  unsigned valid = 1;
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const uint32_t stored[2] = {loaded[i].x, loaded[i].y};
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < Tile::kGroups; ++j) {
      const unsigned code = codes[i / Tile::kRowsPerSet] >> (i % Tile::kRowsPerSet * Tile::kCodeBits + 4 * j) & 15u;
      valid &= valid_codes >> code;
      const auto group = semi_structured::group_of<K>(static_cast<Stored>(stored[j * kStored / 32] >> j * kStored % 32), code);
      words[j * kGroupWords] = static_cast<uint32_t>(group);
      if constexpr (kGroupWords == 2) words[2 * j + 1] = static_cast<uint32_t>(group >> 32);
    }
    weight[tile.at(i)] = make_uint4(words[0], words[1], words[2], words[3]);
  }
  if (valid == 0) atomicOr(status, static_cast<int>(kInconsistent));
}

template <class K>
void unpack_as(
    const void* values, const void* meta, int64_t rows, int64_t columns, void* weight, int* status, cudaStream_t stream) {
  launch(
      unpack<K>, nm_grid<K>(rows, columns), dim3(kTileThreads), stream, static_cast<const uint2*>(values),
      static_cast<const typename K::word*>(meta), rows, nm_chunks<K>(columns), static_cast<uint4*>(weight), status);
}

}  // namespace

void semi_structured_unpack(
    const void* values, const void* meta, int element_size, int64_t rows, int64_t columns, void* weight, int* status,
    cudaStream_t stream) {
  if (rows == 0 || columns == 0) return;
  switch (element_size) {
    case 1: return unpack_as<semi_structured::Int8>(values, meta, rows, columns, weight, status, stream);
    case 2: return unpack_as<semi_structured::Bf16>(values, meta, rows, columns, weight, status, stream);
    default: return unpack_as<semi_structured::F32>(values, meta, rows, columns, weight, status, stream);
  }
}

}  // namespace sparsekern::cuda
