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

// bitmask_pack in two steps, each over chunks of the bitmask: the first counts the bits it sets in each chunk, the second wants those
// counts summed up to the end of each, and moves the values.
int64_t bitmask_chunks(int64_t rows, int64_t columns);
void bitmask_mark(
    const void* weight, DType dtype, int64_t rows, int64_t columns, uint8_t* bits,
    int* counts,   // [chunks]
    int* status,   // kNotFinite: a weight is NaN
    cudaStream_t stream);
void bitmask_gather(
    const void* weight, DType dtype, int64_t rows, int64_t columns,
    const int64_t* ends,  // [chunks]
    void* values, int64_t value_count, cudaStream_t stream);

// bitmask_unpack likewise. kInconsistent: a bit is set past the last column, or not as many bits are set as there are values.
void bitmask_count(const uint8_t* bits, int64_t rows, int64_t columns, int* counts, int* status, cudaStream_t stream);
void bitmask_expand(
    const void* values, DType dtype, int64_t value_count, const uint8_t* bits, const int64_t* ends, int64_t rows, int64_t columns,
    void* weight, int* status, cudaStream_t stream);

}  // namespace sparsekern::cuda
