// Every CUDA launcher, on raw pointers to contiguous row-major device data: one .cu file an op; register_cuda.cpp passes tensors in.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace sparsekern::cuda {

void gram_symmetrize_(float* gram, int64_t features, cudaStream_t stream);

// Masks are bytes, 1 where kept. k is at most `columns`, or at most `rows * columns` for the whole matrix.
void topk_mask(
    const void* scores, DType dtype, int64_t rows, int64_t columns, int64_t k, bool whole_matrix, uint8_t* mask,
    void* workspace,  // of topk_mask_workspace bytes, at an address that 8 divides
    int* status,      // kNotFinite: a score is NaN
    cudaStream_t stream);
int64_t topk_mask_workspace(DType dtype, int64_t rows, int64_t columns, bool whole_matrix);

}  // namespace sparsekern::cuda
