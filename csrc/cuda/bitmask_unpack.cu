// bitmask_unpack: the dense weight of what bitmask_pack packed.
//
// Floor: one read of the values, two of the bits (1/16 of a half weight each), one write of the weight. The first kernel counts the
// bits of each chunk and looks for stray ones; the counts are summed by the caller; the second kernel brings a chunk's values into
// shared memory in whole vectors and writes the weight from there. No value past the last is read, whatever the bits say.
#include "cuda/bitmask.cuh"
#include "cuda/block.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/status.h"

namespace sparsekern::cuda {

namespace {

using namespace bitmask_chunk;

constexpr int kWarps = kThreads / kWarp;

// A warp a chunk; and a thread a row for the bits that stand for no column.
__global__ void __launch_bounds__(kThreads) count_chunks(
    const uint8_t* bits, int64_t bytes, int64_t rows, int64_t row_bytes, uint8_t padding, bool aligned, int* counts, int* status) {
  const int64_t chunk = int64_t{blockIdx.x} * kWarps + warp_index();
  const int64_t begin = chunk * kBytes, end = begin + kBytes < bytes ? begin + kBytes : bytes;
  unsigned set = 0;
  for (int64_t first = begin + 16 * lane_index(); first < end; first += 16 * kWarp) {
    if (aligned && first + 16 <= end) {
      const uint4 sixteen = *reinterpret_cast<const uint4*>(bits + first);
      set += __popc(sixteen.x) + __popc(sixteen.y) + __popc(sixteen.z) + __popc(sixteen.w);
    } else {
      for (int64_t i = first; i < first + 16 && i < end; ++i) set += __popc(bits[i]);
    }
  }
  set = warp_sum(set);
  if (lane_index() == 0 && begin < bytes) counts[chunk] = static_cast<int>(set);

  if (padding == 0) return;
  bool stray = false;
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < rows; row += int64_t{gridDim.x} * kThreads) {
    stray |= (bits[(row + 1) * row_bytes - 1] & padding) != 0;
  }
  if (stray) atomicOr(status, int{kInconsistent});
}

template <class Bits>
__global__ void __launch_bounds__(kThreads) expand_chunk(
    const Bits* values, int64_t value_count, bool aligned, const uint8_t* bits, int64_t bytes, const int64_t* ends,
    Weight<Bits> weight, int* status) {
  __shared__ ScanScratch<kThreads, uint64_t> scratch;
  __shared__ Stage<Bits> stage;
  const int64_t chunk = blockIdx.x;
  const uint32_t chunk_bytes = bytes_of(chunk, bytes);
  unsigned flags[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) flags[v] = byte_of(v) < chunk_bytes ? bits[chunk * kBytes + byte_of(v)] : 0u;
  const auto range = range_of<Bits>(ends, chunk, value_count);
  stage.copy_in(values, aligned, range);
  const TileCounts<kVectors> before = scan_bits(flags, scratch);  // and waits for the block, so all values are in place
  const Columns<Bits> columns(weight, chunk);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (byte_of(v) >= chunk_bytes) continue;
    Eight<Bits> eight = {};
    unsigned place = before[v];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool set = flags[v] >> i & 1;
      eight.set(i, set && place < static_cast<unsigned>(range.count) ? stage.at(range, place) : Bits{0});
      place += set;
    }
    columns.write(byte_of(v), eight);
  }
  if (chunk == gridDim.x - 1 && threadIdx.x == 0 && ends[chunk] != value_count) atomicOr(status, int{kInconsistent});
}

template <class Bits>
void expand(
    const void* values, int64_t value_count, const uint8_t* bits, const int64_t* ends, int64_t rows, int64_t columns, void* weight,
    int* status, cudaStream_t stream) {
  const Weight<Bits> dense(static_cast<Bits*>(weight), columns);
  const int64_t bytes = rows * int64_t{dense.row_bytes};
  launch(
      expand_chunk<Bits>, one_block_each(chunks_of(bytes)), dim3(kThreads), stream, static_cast<const Bits*>(values), value_count,
      is_aligned(values, 16), bits, bytes, ends, dense, status);
}

}  // namespace

void bitmask_count(const uint8_t* bits, int64_t rows, int64_t columns, int* counts, int* status, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return;
  const int64_t row_bytes = bitmask::bytes_per_row(columns);
  const int64_t chunks = chunks_of(rows * row_bytes);
  launch(
      count_chunks, one_block_each((chunks + kWarps - 1) / kWarps), dim3(kThreads), stream, bits, rows * row_bytes, rows, row_bytes,
      bitmask::padding_bits(columns), is_aligned(bits, 16), counts, status);
}

void bitmask_expand(
    const void* values, DType dtype, int64_t value_count, const uint8_t* bits, const int64_t* ends, int64_t rows, int64_t columns,
    void* weight, int* status, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return;
  const auto move = size_of(dtype) == 4 ? &expand<uint32_t> : &expand<uint16_t>;
  move(values, value_count, bits, ends, rows, columns, weight, status, stream);
}

}  // namespace sparsekern::cuda
