// bitmask_pack: the non-zeros of a weight and one bit a weight (common/bitmask_layout.h).
//
// Floor: two reads of the weight (how many values there are, and so where each goes, is known only after the first), one write of
// the bits and of the values. The first kernel marks and counts; the counts are summed by the caller; the second kernel goes through
// the chunks from the last to the first, whose weights are the ones that L2 still holds, gathers a chunk's values in shared memory
// and writes them in whole vectors.
#include "common/order_key.h"
#include "cuda/bitmask.cuh"
#include "cuda/block.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/status.h"

namespace sparsekern::cuda {

namespace {

using namespace bitmask_chunk;

// What a thread has of a chunk: its columns, and their bits.
template <class Bits>
struct Part {
  uint32_t bytes;  // of the chunk
  Eight<Bits> columns[kVectors];
  unsigned bits[kVectors] = {};

  __device__ Part(const Weight<const Bits>& weight, int64_t all_bytes, int64_t chunk) : bytes(bytes_of(chunk, all_bytes)) {
    const Columns<const Bits> source(weight, chunk);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) columns[v] = exists(v) ? source.read(byte_of(v)) : Eight<Bits>{};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 8; ++i) bits[v] |= unsigned{magnitude(v, i) != 0} << i;
    }
  }

  __device__ bool exists(int v) const { return byte_of(v) < bytes; }

  __device__ Bits magnitude(int v, int i) const { return columns[v][i] & static_cast<Bits>(~Bits{0}) >> 1; }

  __device__ bool has_nan(Bits infinity) const {
    bool nan = false;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < 8; ++i) nan |= magnitude(v, i) > infinity;
    }
    return nan;
  }
};

template <class Bits>
__global__ void __launch_bounds__(kThreads)
    mark_chunk(Weight<const Bits> weight, int64_t bytes, Bits infinity, uint8_t* bits, int* counts, int* status) {
  __shared__ ScanScratch<kThreads, unsigned> scratch;
  const int64_t chunk = blockIdx.x;
  const Part<Bits> part(weight, bytes, chunk);
  if (part.has_nan(infinity)) atomicOr(status, int{kNotFinite});
  unsigned set = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (part.exists(v)) bits[chunk * kBytes + byte_of(v)] = static_cast<uint8_t>(part.bits[v]);
    set += __popc(part.bits[v]);
  }
  set = block_sum<kThreads>(set, scratch);
  if (threadIdx.x == 0) counts[chunk] = static_cast<int>(set);
}

template <class Bits>
__global__ void __launch_bounds__(kThreads, 4)
    gather_chunk(Weight<const Bits> weight, int64_t bytes, const int64_t* ends, Bits* values, int64_t value_count, bool aligned) {
  __shared__ ScanScratch<kThreads, uint64_t> scratch;
  __shared__ Stage<Bits> stage;
  const int64_t chunk = gridDim.x - 1 - blockIdx.x;
  const Part<Bits> part(weight, bytes, chunk);
  const TileCounts<kVectors> before = scan_bits(part.bits, scratch);
  const auto range = range_of<Bits>(ends, chunk, value_count);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    unsigned place = before[v];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (part.bits[v] >> i & 1) stage.at(range, place++) = part.columns[v][i];
    }
  }
  __syncthreads();
  stage.copy_out(values, aligned, range);
}

template <class Bits>
void mark(
    const void* weight, int64_t rows, int64_t columns, Bits infinity, uint8_t* bits, int* counts, int* status,
    cudaStream_t stream) {
  const Weight<const Bits> dense(static_cast<const Bits*>(weight), columns);
  const int64_t bytes = rows * int64_t{dense.row_bytes};
  launch(mark_chunk<Bits>, one_block_each(chunks_of(bytes)), dim3(kThreads), stream, dense, bytes, infinity, bits, counts, status);
}

template <class Bits>
void gather(
    const void* weight, int64_t rows, int64_t columns, const int64_t* ends, void* values, int64_t value_count,
    cudaStream_t stream) {
  const Weight<const Bits> dense(static_cast<const Bits*>(weight), columns);
  const int64_t bytes = rows * int64_t{dense.row_bytes};
  launch(
      gather_chunk<Bits>, one_block_each(chunks_of(bytes)), dim3(kThreads), stream, dense, bytes, ends, static_cast<Bits*>(values),
      value_count, is_aligned(values, 16));
}

}  // namespace

int64_t bitmask_chunks(int64_t rows, int64_t columns) { return chunks_of(rows * bitmask::bytes_per_row(columns)); }

void bitmask_mark(
    const void* weight, DType dtype, int64_t rows, int64_t columns, uint8_t* bits, int* counts, int* status, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return;
  if (dtype == DType::f32) {
    mark<uint32_t>(weight, rows, columns, infinity_bits(float{}), bits, counts, status, stream);
  } else {
    const int32_t infinity = dtype == DType::bf16 ? infinity_bits(BFloat16{}) : infinity_bits(Half{});
    mark<uint16_t>(weight, rows, columns, static_cast<uint16_t>(infinity), bits, counts, status, stream);
  }
}

void bitmask_gather(
    const void* weight, DType dtype, int64_t rows, int64_t columns, const int64_t* ends, void* values, int64_t value_count,
    cudaStream_t stream) {
  if (value_count == 0) return;
  const auto move = size_of(dtype) == 4 ? &gather<uint32_t> : &gather<uint16_t>;
  move(weight, rows, columns, ends, values, value_count, stream);
}

}  // namespace sparsekern::cuda
