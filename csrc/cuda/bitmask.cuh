// What bitmask_pack and bitmask_unpack share. The bitmask is cut into chunks of bytes regardless of rows, since values lie in the
// order of its bytes: a block takes one chunk, and where the chunk's values begin is the number of bits set in all before it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "common/bitmask_layout.h"
#include "common/host_device.h"
#include "cuda/block.h"
#include "cuda/vector.h"

namespace sparsekern::cuda::bitmask_chunk {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // bytes of the bitmask a thread
constexpr int kBytes = kThreads * kVectors;
constexpr int kColumns = 8 * kBytes;

SPARSEKERN_HOST_DEVICE inline int64_t chunks_of(int64_t bytes) { return (bytes + kBytes - 1) / kBytes; }

inline dim3 one_block_each(int64_t chunks) {
  if (chunks > 0x7fffffff) throw std::invalid_argument("weight: expected at most 2^31 chunks of 8192 columns");
  return dim3(static_cast<unsigned>(chunks));
}

// The columns that a byte of the bitmask stands for, as vectors.
template <class Bits>
struct Eight {
  static constexpr int kSize = Vector<Bits>::kSize;

  Vector<Bits> parts[8 / kSize];

  __device__ Bits operator[](int i) const { return parts[i / kSize][i % kSize]; }
  __device__ void set(int i, Bits bits) { parts[i / kSize].set(i % kSize, bits); }
};

// The weight as the bitmask sees it, to read (Element is const) or to write.
template <class Element>
struct Weight {
  Element* elements;
  int64_t columns;
  uint32_t row_bytes;  // of the bitmask
  bool whole;          // every byte stands for 8 columns at an address that 16 divides

  Weight(Element* elements, int64_t columns)
      : elements(elements),
        columns(columns),
        row_bytes(static_cast<uint32_t>(bitmask::bytes_per_row(columns))),
        whole(columns % bitmask::kBitsPerByte == 0 && is_aligned(elements, 16)) {
    if (columns >= int64_t{1} << 34) throw std::invalid_argument("weight: expected fewer than 2^34 columns");
  }
};

// The columns of one chunk of the bitmask; bytes are counted from the chunk's first.
template <class Element>
struct Columns {
  using Bits = std::remove_const_t<Element>;
  static constexpr int kSize = Vector<Bits>::kSize;

  Weight<Element> weight;
  Element* elements = nullptr;  // where all is whole
  int64_t row = 0;              // of the first byte, else,
  uint32_t offset = 0;          // and its place in it

  __device__ Columns(const Weight<Element>& weight, int64_t chunk) : weight(weight) {
    if (weight.whole) {
      elements = weight.elements + chunk * kColumns;
    } else {
      row = chunk * kBytes / weight.row_bytes;
      offset = static_cast<uint32_t>(chunk * kBytes - row * weight.row_bytes);
    }
  }

  __device__ Eight<Bits> read(uint32_t byte) const {
    Eight<Bits> result = {};
    if (weight.whole) {
#pragma unroll
      for (int i = 0; i < 8; i += kSize) result.parts[i / kSize] = Vector<Bits>::read(elements + 8 * byte + i);
    } else {
      const Span span = span_of(byte);
#pragma unroll
      for (int i = 0; i < 8; ++i) result.set(i, i < span.count ? span.first[i] : Bits{0});
    }
    return result;
  }

  __device__ void write(uint32_t byte, const Eight<Bits>& eight) const {
    if (weight.whole) {
#pragma unroll
      for (int i = 0; i < 8; i += kSize) eight.parts[i / kSize].write(elements + 8 * byte + i);
    } else {
      const Span span = span_of(byte);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < span.count) span.first[i] = eight[i];
      }
    }
  }

 private:
  struct Span {
    Element* first;
    int count;
  };

  __device__ Span span_of(uint32_t byte) const {
    const uint32_t rows_down = (offset + byte) / weight.row_bytes;
    const int64_t column = bitmask::kBitsPerByte * int64_t{offset + byte - rows_down * weight.row_bytes};
    const int64_t left = weight.columns - column;
    return {weight.elements + (row + rows_down) * weight.columns + column, static_cast<int>(left < 8 ? left : 8)};
  }
};

// Byte v of a thread, counted from the chunk's first: byte v of all threads comes before byte v + 1 of any.
__device__ inline uint32_t byte_of(int v) { return v * kThreads + threadIdx.x; }

// How many bytes a chunk has.
__device__ inline uint32_t bytes_of(int64_t chunk, int64_t all_bytes) {
  const int64_t left = all_bytes - chunk * kBytes;
  return static_cast<uint32_t>(left < kBytes ? left : kBytes);
}

// How many bits are set in the chunk before each of this thread's bytes.
__device__ inline TileCounts<kVectors> scan_bits(const unsigned (&bits)[kVectors], ScanScratch<kThreads, uint64_t>& scratch) {
  TileCounts<kVectors> counts;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) counts.set(v, __popc(bits[v]));
  scan_tile<kThreads>(counts, scratch);
  return counts;
}

// The values of a chunk in shared memory, at the distance from a 16-byte boundary that they have in device memory: so both sides
// are moved in whole vectors, whatever the values before the chunk number.
template <class Bits>
struct Stage {
  static constexpr int kSize = Vector<Bits>::kSize;

  alignas(16) Bits staged[kColumns + kSize];

  // Where a chunk's values lie among all.
  struct Range {
    int64_t start;
    int count;

    __device__ int phase() const { return static_cast<int>(start % kSize); }
  };

  __device__ Bits& at(const Range& range, unsigned place) { return staged[range.phase() + place]; }

  __device__ void copy_out(Bits* values, bool aligned, const Range& range) const {
    each_vector(aligned, range, [&](bool whole, int first, int64_t there) {
      if (whole) return Vector<Bits>::read(staged + first).write(values + there);
      each_element(range, first, [&](int i) { values[there + i] = staged[first + i]; });
    });
  }

  __device__ void copy_in(const Bits* values, bool aligned, const Range& range) {
    each_vector(aligned, range, [&](bool whole, int first, int64_t there) {
      if (whole) return Vector<Bits>::read(values + there).write(staged + first);
      each_element(range, first, [&](int i) { staged[first + i] = values[there + i]; });
    });
  }

 private:
  // f(whether all of it counts, its place in `staged`, its place in memory)
  template <class F>
  __device__ static void each_vector(bool aligned, const Range& range, const F& f) {
    const int end = range.phase() + range.count;
    for (int first = static_cast<int>(threadIdx.x) * kSize; first < end; first += kThreads * kSize) {
      f(aligned && first >= range.phase() && first + kSize <= end, first, range.start - range.phase() + first);
    }
  }

  template <class F>
  __device__ static void each_element(const Range& range, int first, const F& f) {
    for (int i = 0; i < kSize; ++i) {
      if (first + i >= range.phase() && first + i < range.phase() + range.count) f(i);
    }
  }
};

// The range of a chunk, no part of it past the last value. `ends` holds how many bits are set up to the end of each chunk.
template <class Bits>
__device__ inline typename Stage<Bits>::Range range_of(const int64_t* ends, int64_t chunk, int64_t values) {
  const int64_t start = chunk == 0 ? 0 : ends[chunk - 1];
  const int64_t end = ends[chunk] < values ? ends[chunk] : values;
  return {start, static_cast<int>(end > start ? end - start : 0)};
}

}  // namespace sparsekern::cuda::bitmask_chunk
