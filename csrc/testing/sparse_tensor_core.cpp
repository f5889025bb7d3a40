// Multiplies a 2:4 matrix of bfloat16, [32, 128], by [128, 8] with one warp, as CUTLASS's kernels read PyTorch's semi-structured tensors.
//
// Their metadata goes from memory through ldmatrix to mma.sp without another instruction (CUTLASS,
// include/cutlass/gemm/warp/mma_tensor_op_tile_iterator_sparse.h and mma_sparse_tensor_op.h), so that the layout of the tensor says which
// lane brings which positions. The right product shows that `multiply_add_sparse` takes positions as the hardware does.
//
// Reads values [32, 64], metadata [32, 8] and the other matrix [8, 128], 16 bits each, and writes the product, [32, 8] float32.
#include <cstdio>

#include "common/dtype.h"
#include "cuda/launch.h"
#include "cuda/tensor_core.cuh"

namespace sparsekern::cuda {

namespace {

constexpr int kRows = 32, kColumns = 128, kTokens = 8, kSteps = 4;

struct alignas(16) Operands {
  uint16_t values[kRows][kColumns / 2];
  uint16_t meta[kSteps][2 * kRows];  // of 32 columns each
  uint16_t x[kTokens][kColumns];
};

Operands given;
float product[kRows][kTokens];

uint32_t pair(const uint16_t* halves) { return halves[0] | uint32_t{halves[1]} << 16; }

template <unsigned kHalf>
void multiply_half(const uint32_t (&positions)[kSteps]) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  float sums[4] = {};
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[4], b[4];
    for (int i = 0; i < 4; ++i) {
      a[i] = pair(&given.values[16 * kHalf + g + i % 2 * 8][16 * step + i / 2 * 8 + 2 * t]);
      b[i] = pair(&given.x[g][32 * step + 8 * i + 2 * t]);
    }
    multiply_add_sparse<BFloat16, kHalf>(sums, a, b, positions[step]);
  }
  for (int i = 0; i < 4; ++i) product[16 * kHalf + g + i / 2 * 8][2 * t + i % 2] = sums[i];
}

void multiply() {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t positions[kSteps];
  load_matrices(positions, &given.meta[lane / 8][lane % 8 * 8]);
  multiply_half<0>(positions);
  multiply_half<1>(positions);
}

}  // namespace

}  // namespace sparsekern::cuda

int main() {
  using namespace sparsekern::cuda;
  if (std::fread(&given, sizeof given, 1, stdin) != 1) return 1;
  launch(multiply, dim3(1), dim3(32), nullptr);
  return std::fwrite(product, sizeof product, 1, stdout) == 1 ? 0 : 1;
}
