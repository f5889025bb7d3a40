// What the products of at most 16 tokens with a packed weight share (bitmask_linear.cu, nm_linear.cu, nm_q4_linear.cu).
//
// A thread block has a tile of 16 rows. Its warps share the columns: each has a range of steps, and copies what it needs for them by
// itself, so that no warp waits for another before the end. Where tiles are fewer than multiprocessors, several thread blocks share
// the columns of a tile. Sums are added in the order of the columns, so that a result depends on no timing.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "common/dtype.h"
#include "cuda/block.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace sparsekern::cuda {

constexpr int kDecodeRows = 16;
constexpr int kMostSplits = 8;

// Returns the number of the warp from its first lane, so that the compiler sees that all lanes have the same and none diverges by it.
__device__ inline int uniform_warp_index() { return __shfl_sync(kWholeWarp, warp_index(), 0); }

// The range of steps of one of `parts` workers. Steps are at most 2^19 and parts at most 64, so that 32 bits hold their product.
struct Steps {
  int first, last;

  __device__ Steps(int steps, int part, int parts)
      : first(static_cast<int>(static_cast<unsigned>(steps) * part / static_cast<unsigned>(parts))),
        last(static_cast<int>(static_cast<unsigned>(steps) * (part + 1) / static_cast<unsigned>(parts))) {}
};

// Adds the sums of the warps of a block, [16, 8] for each group of 8 tokens (cuda/tensor_core.cuh), and stores them with the bias.
// Where a tile has several blocks, it stores the sums in `partials` for add_splits. `row_of` returns the row of the result for a row
// of the tile, or -1. `scratch` has 128 floats for each warp and group; what it held is lost.
template <class T, int kGroups, class RowOf>
__device__ void store_tile(const float (&sums)[kGroups][4], float* scratch, const Decode& call, const RowOf& row_of) {
  constexpr int kSums = 4 * kGroups;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; ++i) scratch[(warp_index() * kSums + i) * kWarp + lane_index()] = sums[i / 4][i % 4];
  __syncthreads();
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int i = threadIdx.x; i < kDecodeRows * call.tokens; i += blockDim.x) {
    const int in_tile = i % kDecodeRows, token = i / kDecodeRows;
    const int64_t row = row_of(in_tile);
    if (row < 0) continue;
    const int sum = 4 * (token / 8) + 2 * (in_tile / 8) + token % 2, lane = in_tile % 8 * 4 + token % 8 / 2;
    float total = 0;
    for (int warp = 0; warp < warps; ++warp) total += scratch[(warp * kSums + sum) * kWarp + lane];
    if (gridDim.y == 1) {
      if (call.bias != nullptr) total += to_float(static_cast<const T*>(call.bias)[row]);
      static_cast<T*>(call.y)[token * call.rows + row] = from_float<T>(total);
    } else {
      call.partials[(int64_t{blockIdx.y} * call.tokens + token) * call.rows + row] = total;
    }
  }
}

template <class T>
__global__ void add_splits(const Decode call, int splits) {
  const int64_t count = call.tokens * call.rows, i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  float total = 0;
  for (int split = 0; split < splits; ++split) total += call.partials[split * count + i];
  if (call.bias != nullptr) total += to_float(static_cast<const T*>(call.bias)[i % call.rows]);
  static_cast<T*>(call.y)[i] = from_float<T>(total);
}

inline int64_t decode_tiles(int64_t rows) { return (rows + kDecodeRows - 1) / kDecodeRows; }

// Returns how many blocks share the columns of a tile: enough for every multiprocessor, but none without a step for each warp.
inline int decode_splits(int64_t rows, int64_t steps, int warps) {
  int device = 0, processors = 0;
  check_cuda(cudaGetDevice(&device), "device query");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device query");
  const int64_t tiles = std::max<int64_t>(decode_tiles(rows), 1);
  const int64_t wanted = (processors + tiles - 1) / tiles;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({wanted, kMostSplits, steps / warps})));
}

// Returns the floats that a call needs for the sums of its splits.
inline int64_t decode_workspace(const Decode& call, int splits) { return splits == 1 ? 0 : splits * call.tokens * call.rows; }

template <class T>
void launch_add_splits(const Decode& call, int splits, cudaStream_t stream) {
  constexpr int kThreads = 128;
  const int64_t blocks = (call.tokens * call.rows + kThreads - 1) / kThreads;
  if (splits > 1) launch(add_splits<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, call, splits);
}

}  // namespace sparsekern::cuda
