// gram_symmetrize_: copies the lower triangle onto the upper one, in place.
//
// Floor: one read and one write of half the matrix.
#include <stdexcept>

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace sparsekern::cuda {

namespace {

constexpr int kTile = 32;       // a warp reads and writes whole 128-byte lines of a tile
constexpr int kRowsAtOnce = 8;  // 256 threads: each carries four elements, enough loads in flight to hide the latency
constexpr int kMaxGridY = 65535;

struct Tile {
  int row, column;
  bool exists;
};

// Maps the n(n+1)/2 tiles of a lower triangle to a grid of (n+1) x ceil(n/2) blocks. Grid row y holds tile row y followed by tile
// row n-1-y, which together have n+1 tiles. No block idles, except half a grid row if n is odd.
__host__ __device__ inline Tile lower_tile(int tiles, int x, int y) {
  if (x <= y) return {y, x, true};
  const int row = tiles - 1 - y;
  return {row, x - y - 1, row != y};
}

// Each block mirrors one tile through shared memory, so that the reads and the writes are both coalesced.
__global__ void __launch_bounds__(kTile* kRowsAtOnce) mirror_lower(float* __restrict__ gram, int64_t features, int tiles) {
  __shared__ float staged[kTile][kTile + 1];  // the odd pitch keeps the transposed read free of bank conflicts
  const Tile tile = lower_tile(tiles, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y));
  if (!tile.exists) return;

  const int64_t row0 = int64_t{tile.row} * kTile, column0 = int64_t{tile.column} * kTile;
  for (int i = threadIdx.y; i < kTile; i += kRowsAtOnce) {
    const int64_t row = row0 + i, column = column0 + threadIdx.x;
    if (row < features && column <= row) staged[i][threadIdx.x] = gram[row * features + column];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTile; i += kRowsAtOnce) {
    const int64_t row = column0 + i, column = row0 + threadIdx.x;
    if (column < features && row < column) gram[row * features + column] = staged[threadIdx.x][i];
  }
}

}  // namespace

void gram_symmetrize_(float* gram, int64_t features, cudaStream_t stream) {
  if (features == 0) return;
  const int64_t tiles = (features + kTile - 1) / kTile;
  if ((tiles + 1) / 2 > kMaxGridY) throw std::invalid_argument("gram: expected at most 4194240 features");
  const dim3 grid(static_cast<unsigned>(tiles + 1), static_cast<unsigned>((tiles + 1) / 2));
  launch(mirror_lower, grid, dim3(kTile, kRowsAtOnce), stream, gram, features, static_cast<int>(tiles));
}

}  // namespace sparsekern::cuda
