#include <algorithm>

#include "cpu/kernels.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kTile = 32;  // two tiles of 32 x 32 floats, 8 KiB: both sides of the transposition stay in L1

void mirror_tile(float* gram, int64_t features, int64_t row, int64_t column) {
  const int64_t row_end = std::min(row + kTile, features);
  for (int64_t j = column; j < std::min(column + kTile, features); ++j) {
    for (int64_t i = std::max(row, j + 1); i < row_end; ++i) gram[j * features + i] = gram[i * features + j];
  }
}

}  // namespace

void gram_symmetrize_(float* gram, int64_t features, const Executor& executor) {
  const int64_t tiles = (features + kTile - 1) / kTile;
  parallel_tasks(executor, tiles, [=](int64_t tile) {
    for (int64_t column = 0; column <= tile; ++column) mirror_tile(gram, features, tile * kTile, column * kTile);
  });
}

}  // namespace sparsekern::cpu
