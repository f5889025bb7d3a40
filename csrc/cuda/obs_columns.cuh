// The storage of the columns of a block of obs_sweep: V in shared memory, weights in registers, eight lanes per row and four rows
// per warp.
//
// A lane owns `kWidth` neighbouring columns in each chunk of 8 * kWidth. The eight lanes of a row therefore read and write whole
// 128-byte lines of float32, and no matrix is transposed. Rows of all matrices, and blocks, begin at multiples of four elements.
#pragma once

#include "common/dtype.h"
#include "cuda/block.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace sparsekern::cuda {

constexpr int kMaxColumns = 128;  // columns of a block
constexpr int kLanesPerRow = 8;
constexpr int kRowsPerWarp = 4;

// Neighbouring lanes hold the same columns of different rows, so that a quarter of a warp reads only two addresses of the triangle.
__device__ inline int row_of_lane() { return lane_index() % kRowsPerWarp; }
__device__ inline int place_of_lane() { return lane_index() / kRowsPerWarp; }
__device__ inline int lane_at(int place) { return place * kRowsPerWarp + row_of_lane(); }

template <int kWidth>
struct Layout {
  static constexpr int kChunk = kLanesPerRow * kWidth;
  static constexpr int kChunks = kMaxColumns / kChunk;

  // In shared memory, row k of the triangle begins at the first column of its own chunk.
  __host__ __device__ static constexpr int pitch(int chunk) { return kMaxColumns - chunk * kChunk; }
  __host__ __device__ static constexpr int offset(int chunk) {
    return kChunk * (chunk * kMaxColumns - chunk * (chunk - 1) / 2 * kChunk);
  }

  // Returns the first of a lane's columns in a chunk.
  __device__ static int column(int chunk) { return chunk * kChunk + place_of_lane() * kWidth; }
};

// One number per column that a lane owns.
template <class T, int kWidth>
using Owned = T[Layout<kWidth>::kChunks][kWidth];

// A lane's part of one row.
template <int kWidth>
struct Columns {
  Owned<float, kWidth> start;  // the weights as given; 0 for dead features and past the block's width
  Owned<float, kWidth> taken;  // what earlier columns have taken from each weight, whose current value is start - taken
  unsigned keep;               // the mask: bit kWidth * chunk + i

  __device__ bool kept(int chunk, int i) const { return (keep >> (chunk * kWidth + i) & 1) != 0; }
  __device__ float now(int chunk, int i) const { return start[chunk][i] - taken[chunk][i]; }
  // Returns the error of removing the weight; its square has the same order. `diagonal` is the diagonal entry of its feature.
  __device__ float score(int chunk, int i, float diagonal) const { return fabsf(now(chunk, i)) * diagonal; }
};

// The part of V that a block needs. The coefficient of k and j > k is -V_kj / V_jj: what is taken from weight k, times the
// coefficient, is taken from weight j. It is zero for j <= k and for dead features j.
template <int kWidth>
struct Triangle {
  using L = Layout<kWidth>;
  float* coefficients;  // L::offset(L::kChunks)
  float* diagonal;      // [kMaxColumns] V_jj; 0 for dead features
  float* reciprocal;    // [kMaxColumns] -1 / V_jj; 0 for dead features

  static constexpr int kFloats = L::offset(L::kChunks) + 2 * kMaxColumns;

  __device__ explicit Triangle(float* shared)
      : coefficients(shared), diagonal(shared + L::offset(L::kChunks)), reciprocal(diagonal + kMaxColumns) {}
  // Returns the address that column 0 of row k would have.
  __device__ float* row(int k) const {
    const int chunk = k / L::kChunk;
    return coefficients + L::offset(chunk) + (k - chunk * L::kChunk) * L::pitch(chunk) - chunk * L::kChunk;
  }
  __device__ float at(int k, int column) const { return row(k)[column]; }
};

template <int kCount>
__device__ __forceinline__ void load_shared(const float* address, float (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(address + i);
    out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
  }
}

template <class T>
__device__ __forceinline__ void store_four(T* address, const float (&in)[4]) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(address) = make_float4(in[0], in[1], in[2], in[3]);
  } else {
    *reinterpret_cast<ushort4*>(address) =
        make_ushort4(from_float<T>(in[0]).bits, from_float<T>(in[1]).bits, from_float<T>(in[2]).bits, from_float<T>(in[3]).bits);
  }
}

// Fills the triangle of a block. A warp takes whole rows of V, so that a lane keeps its four columns and their reciprocals. With
// the largest number of warps it waits for memory twice.
template <int kWidth>
__device__ __forceinline__ void load_triangle(const ObsBlock& block, const Triangle<kWidth>& triangle) {
  using L = Layout<kWidth>;
  constexpr int kAtOnce = 8;
  const int width = block.width, rows = (width + L::kChunk - 1) / L::kChunk * L::kChunk;
  const int column = lane_index() * 4, warps = static_cast<int>(blockDim.x) / kWarp;
  const int64_t stride = block.columns, step = warps * stride;
  const float* const corner = block.factor + block.begin * (stride + 1);
  float4 raw[kAtOnce];
  const auto load = [&](int first) {
    const float* source = corner + first * stride + column;
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const bool needed = first + r * warps < column + 3 && column < width;  // neither below the diagonal nor past the width
      raw[r] = needed ? __ldg(reinterpret_cast<const float4*>(source)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      source += step;
    }
  };
  float diagonal[4], reciprocal[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) diagonal[i] = column + i < width ? __ldg(corner + (column + i) * (stride + 1)) : 0.0f;
  load(warp_index());
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    diagonal[i] = diagonal[i] > 0.0f ? diagonal[i] : 0.0f;
    reciprocal[i] = diagonal[i] > 0.0f ? -1.0f / diagonal[i] : 0.0f;
  }
  if (warp_index() == 0) {
    store_four(triangle.diagonal + column, diagonal);
    store_four(triangle.reciprocal + column, reciprocal);
  }
#pragma unroll 1
  for (int first = warp_index(); first < rows;) {
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int k = first + r * warps;
      float four[4] = {raw[r].x, raw[r].y, raw[r].z, raw[r].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] = k < column + i ? four[i] * reciprocal[i] : 0.0f;
      if (k < rows && column >= k / L::kChunk * L::kChunk) store_four(triangle.row(k) + column, four);
    }
    first += kAtOnce * warps;
    if (first < rows) load(first);
  }
}

// A lane's columns in groups of four, which are loaded and stored at once.
template <int kWidth>
struct Parts {
  static constexpr int kPerChunk = kWidth / 4;
  static constexpr int kCount = Layout<kWidth>::kChunks * kPerChunk;
  __device__ static constexpr int chunk(int part) { return part / kPerChunk; }
  __device__ static constexpr int first(int part) { return part % kPerChunk * 4; }
  __device__ static int column(int part) { return Layout<kWidth>::column(chunk(part)) + first(part); }
};

// A lane's columns of a row of a matrix, as loaded. Nothing waits for the loads before the elements are unpacked.
template <int kWidth>
struct RawColumns {
  using P = Parts<kWidth>;
  uint4 part[P::kCount];  // four elements of four bytes; elements of two bytes use the first half

  // Loads from the row's first element of the block on; zeros past `width`.
  template <class T>
  __device__ __forceinline__ void load(const T* row, int width) {
#pragma unroll
    for (int p = 0; p < P::kCount; ++p) {
      part[p] = make_uint4(0, 0, 0, 0);
      if (P::column(p) >= width) continue;
      if constexpr (sizeof(T) == 4) {
        part[p] = *reinterpret_cast<const uint4*>(row + P::column(p));
      } else {
        const uint2 four = *reinterpret_cast<const uint2*>(row + P::column(p));
        part[p].x = four.x, part[p].y = four.y;
      }
    }
  }

  template <class T>
  __device__ __forceinline__ void unpack(Owned<float, kWidth>& out) const {
#pragma unroll
    for (int p = 0; p < P::kCount; ++p) {
      float* const four = out[P::chunk(p)] + P::first(p);
      if constexpr (sizeof(T) == 4) {
        four[0] = __uint_as_float(part[p].x), four[1] = __uint_as_float(part[p].y);
        four[2] = __uint_as_float(part[p].z), four[3] = __uint_as_float(part[p].w);
      } else {
        four[0] = to_float(low<T>(part[p].x)), four[1] = to_float(high<T>(part[p].x));
        four[2] = to_float(low<T>(part[p].y)), four[3] = to_float(high<T>(part[p].y));
      }
    }
  }

 private:
  template <class T>
  __device__ static T low(unsigned word) {
    return T{static_cast<uint16_t>(word)};
  }
  template <class T>
  __device__ static T high(unsigned word) {
    return T{static_cast<uint16_t>(word >> 16)};
  }
};

// Stores four bits as bytes, 1 where kept.
__device__ __forceinline__ void store_four_bits(uint8_t* address, unsigned bits) {
  *reinterpret_cast<uchar4*>(address) = make_uchar4(bits & 1, bits >> 1 & 1, bits >> 2 & 1, bits >> 3 & 1);
}

template <int kWidth>
__device__ __forceinline__ unsigned load_bits(const uint8_t* row, int width) {
  using P = Parts<kWidth>;
  unsigned bits = 0;
#pragma unroll
  for (int p = 0; p < P::kCount; ++p) {
    if (P::column(p) >= width) continue;
    const uchar4 four = *reinterpret_cast<const uchar4*>(row + P::column(p));
    bits |= (four.x | four.y << 1 | four.z << 2 | four.w << 3) << (4 * p);
  }
  return bits;
}

}  // namespace sparsekern::cuda
