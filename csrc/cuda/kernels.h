// Every CUDA launcher, on raw pointers to contiguous row-major device data: one .cu file an op; its <op>_op.cpp passes tensors in.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/semi_structured.h"

namespace sparsekern::cuda {

void gram_symmetrize_(float* gram, int64_t features, cudaStream_t stream);

// Masks are bytes, 1 where kept. k is at most `columns`, or at most `rows * columns` for the whole matrix.
void topk_mask(
    const void* scores, DType dtype, int64_t rows, int64_t columns, int64_t k, bool whole_matrix, uint8_t* mask,
    void* workspace,  // of topk_mask_workspace bytes, at an address that 8 divides
    int* status,      // kNotFinite: a score is NaN
    cudaStream_t stream);
int64_t topk_mask_workspace(DType dtype, int64_t rows, int64_t columns, bool whole_matrix);

// Of 2:4 and N:M. Every pointer is one that 16 divides; shapes are multiples of the layout's (common/semi_structured.h); `status` gets bits
// of cuda/status.h. A mask is a byte a score, 1 where kept.
void nm_mask(const void* scores, DType dtype, int64_t groups, int n, int m, uint8_t* mask, int* status, cudaStream_t stream);
void semi_structured_pack(
    const void* weight, semi_structured::Type type, int64_t rows, int64_t columns, void* values, void* meta, int* status,
    cudaStream_t stream);
void semi_structured_prune_pack(
    const void* weight, DType dtype, const void* scores /* null: the magnitudes of the weight */, DType scores_dtype, int64_t rows,
    int64_t columns, void* values, void* meta, int* status, cudaStream_t stream);
void semi_structured_unpack(
    const void* values, const void* meta, int element_size, int64_t rows, int64_t columns /* of the weight */, void* weight,
    int* status, cudaStream_t stream);

// How obs_sweep comes by the mask of a block.
enum class ObsChoice {
  given,  // by the caller
  group,  // the best `kept` of every `group` columns, from the weights as they stand when the group is reached
  row,    // the best `kept` of each row, from the weights as they stand when the block is reached
  block,  // the best `kept` of all rows, likewise
};

// The columns [begin, begin + width) of a sweep, width at most 128. Columns and blocks begin at multiples of four elements and of 16
// bytes; those up to the next multiple of four from the end are the block's, too, and `weight` is 0 there.
struct ObsBlock {
  const void* weight;  // [rows, columns] of dtype
  DType dtype;
  const float* factor;  // [columns, columns]
  float* delta;  // from the block's first column on: on entry the products with the columns before, on exit weight - new weight
  int64_t delta_stride;
  uint8_t* mask;     // [rows, columns]; read or written
  void* new_weight;  // [rows, columns] of dtype
  float* row_error;  // [rows], added to
  float* scores;     // laid out like delta; of obs_sweep_scores only
  int* status;
  int64_t rows, columns, begin;
  int width;
  ObsChoice choice;
  int64_t kept;
  int group;
  int warps;          // 1 to 8 of a thread block, four rows each
  int tiles;          // where all rows compete: of 32 rows of a thread block; obs_sweep_tiles(rows)
  uint32_t* cleared;  // likewise: obs_sweep_cleared_words(), zero before and used once
  uint32_t* shared;   // likewise: obs_sweep_shared_words(rows), anything
};
void obs_sweep_block(const ObsBlock& block, cudaStream_t stream);
// What it takes to have so many rows compete in one launch on the current device; 0 if that cannot be.
int obs_sweep_tiles(int64_t rows);
int64_t obs_sweep_cleared_words();
int64_t obs_sweep_shared_words(int64_t rows);
// Prunes nothing: writes what removing each weight would cost, and to `delta` weight - (weight as it stands).
void obs_sweep_scores(const ObsBlock& block, cudaStream_t stream);
// Flags NaN and infinities.
void obs_sweep_check_factor(const float* factor, int64_t count, int* status, cudaStream_t stream);

}  // namespace sparsekern::cuda
