// All CUDA launchers, on raw pointers to contiguous row-major device data. One .cu file per op; its <op>_op.cpp passes tensors in.
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
    void* workspace,  // topk_mask_workspace bytes, 8-byte aligned
    int* status,      // kNotFinite: a score is NaN
    cudaStream_t stream);
int64_t topk_mask_workspace(DType dtype, int64_t rows, int64_t columns, bool whole_matrix);

// 2:4 and N:M. All pointers are 16-byte aligned; shapes are multiples of the layout's (common/semi_structured.h); `status` gets
// bits of cuda/status.h. A mask is one byte per score, 1 where kept.
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

// The way obs_sweep obtains the mask of a block.
enum class ObsChoice {
  given,  // by the caller
  group,  // the best `kept` of every `group` columns, from the current weights when the sweep reaches the group
  row,    // the best `kept` of each row, from the current weights when the sweep reaches the block
  block,  // the best `kept` of all rows, likewise
};

// The columns [begin, begin + width) of a sweep, width at most 128. Columns and blocks begin at multiples of four elements and of
// 16 bytes. The padding up to the next multiple of four belongs to the block; `weight` is 0 there.
struct ObsBlock {
  const void* weight;  // [rows, columns] of dtype
  DType dtype;
  const float* factor;  // [columns, columns]
  float* delta;  // begins with the block's first column: on entry the products with the columns before, on exit weight - new weight
  int64_t delta_stride;
  uint8_t* mask;     // [rows, columns]; read or written
  void* new_weight;  // [rows, columns] of dtype
  float* row_error;  // [rows], added to
  float* scores;     // laid out like delta; only for obs_sweep_scores
  int* status;
  int64_t rows, columns, begin;
  int width;
  ObsChoice choice;
  int64_t kept;
  int group;
  int warps;          // warps per thread block, 1 to 8, four rows each
  int tiles;          // if all rows compete: tiles of 32 rows per thread block, from obs_sweep_tiles(rows)
  uint32_t* cleared;  // likewise: obs_sweep_cleared_words() words, zero before use and used once
  uint32_t* shared;   // likewise: obs_sweep_shared_words(rows) words, need not be cleared
};
void obs_sweep_block(const ObsBlock& block, cudaStream_t stream);
// Returns the tiles per thread block that let this many rows compete in one launch on the current device, or 0 if they cannot.
int obs_sweep_tiles(int64_t rows);
int64_t obs_sweep_cleared_words();
int64_t obs_sweep_shared_words(int64_t rows);
// Prunes nothing: writes the cost of removing each weight, and to `delta` the weight minus its current value.
void obs_sweep_scores(const ObsBlock& block, cudaStream_t stream);
// Flags NaN and infinities.
void obs_sweep_check_factor(const float* factor, int64_t count, int* status, cudaStream_t stream);

// A product of at most 16 tokens with a packed weight.
struct Decode {
  const void* x;     // [tokens, columns], rows of whole 128 bytes, 16-byte aligned
  const void* bias;  // [rows] or null
  void* y;           // [tokens, rows]
  float* partials;   // as many floats as the op's workspace function says
  int64_t rows, columns;
  int tokens;
  DType dtype;
};

// Bitmask rows of 16-bit values (common/packed_rows.h); `columns` is a multiple of 64. All pointers are 16-byte aligned.
struct DecodeBitmask {
  const uint32_t* slots;
  int64_t slot_count;  // the spare ones included
  const uint64_t* bits;
  const int64_t* starts;
  const int32_t* order;
  int* status;  // kInconsistent if these contradict each other; null: not checked
};
void bitmask_linear(const Decode& call, const DecodeBitmask& weight, cudaStream_t stream);
int64_t bitmask_linear_workspace(const Decode& call);

// Rows of 16-bit values that keep `kept`, 2 or 1, of every four (common/packed_rows.h); `columns` is a multiple of 128, or of 256 for 1:4.
// `values` and `codes` are 16-byte aligned.
void nm_linear(const Decode& call, const void* values, const uint32_t* codes, int kept, cudaStream_t stream);
int64_t nm_linear_workspace(const Decode& call);

// 2:4 rows with values of 4 bits (common/nm_q4.h); `columns` is a multiple of 64. `blocks` is 16-byte aligned.
void nm_q4_linear(const Decode& call, const void* blocks, cudaStream_t stream);
int64_t nm_q4_linear_workspace(const Decode& call);

}  // namespace sparsekern::cuda
