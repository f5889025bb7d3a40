// Every CUDA launcher, on raw pointers to contiguous row-major device data: one .cu file an op; its <op>_op.cpp passes tensors in.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/nm_layout.h"

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

// Of 2:4 and N:M. Every pointer is one that 16 divides; shapes are multiples of the layout's (common/nm_layout.h); `status` gets bits
// of cuda/status.h. A mask is a byte a score, 1 where kept.
void nm_mask(
    const void* scores, DType dtype, int64_t groups, int n, int m, uint8_t* mask, int* status, cudaStream_t stream);
void nm_pack(
    const void* weight, nm::Type type, int64_t rows, int64_t columns, void* values, void* meta, int* status, cudaStream_t stream);
void nm_prune_pack(
    const void* weight, DType dtype, const void* scores /* null: the magnitudes of the weight */, DType scores_dtype, int64_t rows,
    int64_t columns, void* values, void* meta, int* status, cudaStream_t stream);
void nm_unpack(
    const void* values, const void* meta, int element_size, int64_t rows, int64_t columns /* of the weight */, void* weight,
    int* status, cudaStream_t stream);

}  // namespace sparsekern::cuda
