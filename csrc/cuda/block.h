// Collective functions of a warp or of a one-dimensional block. All threads of the block call the block's functions. These use
// shared memory owned by the caller, because a cooperative kernel has no static one (testing/simt).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sparsekern::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

template <class T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWholeWarp, value, step);
  return value;
}

template <class T>
__device__ inline T warp_inclusive_scan(T value) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T below = __shfl_up_sync(kWholeWarp, value, step);
    if (lane_index() >= step) value += below;
  }
  return value;
}

template <class T>
struct Scan {
  T before;  // the sum over the threads before this one
  T total;   // the sum over the whole block
};

// Scratch memory of one word per warp.
template <int kThreads, class T>
struct ScanScratch {
  T warps[kThreads / kWarp];
};

// Scans integers, whose sums do not depend on the order. Waits for the block first, so that the scratch of the previous call may be
// reused.
template <int kThreads, class T>
__device__ inline Scan<T> block_scan(T value, ScanScratch<kThreads, T>& scratch) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp, "a block is at most 32 whole warps");
  constexpr int kWarps = kThreads / kWarp;
  const T inclusive = warp_inclusive_scan(value);
  if constexpr (kWarps == 1) return {inclusive - value, __shfl_sync(kWholeWarp, inclusive, kWarp - 1)};
  __syncthreads();
  if (lane_index() == kWarp - 1) scratch.warps[warp_index()] = inclusive;
  __syncthreads();
  const T warps = warp_inclusive_scan(lane_index() < kWarps ? scratch.warps[lane_index()] : T{});
  const T earlier = __shfl_sync(kWholeWarp, warps, (warp_index() + kWarp - 1) % kWarp);
  return {(warp_index() == 0 ? T{} : earlier) + inclusive - value, __shfl_sync(kWholeWarp, warps, kWarps - 1)};
}

template <int kThreads, class T>
__device__ inline T block_sum(T value, ScanScratch<kThreads, T>& scratch) {
  constexpr int kWarps = kThreads / kWarp;
  const T sum = warp_sum(value);
  if constexpr (kWarps == 1) return sum;
  __syncthreads();
  if (lane_index() == 0) scratch.warps[warp_index()] = sum;
  __syncthreads();
  return warp_sum(lane_index() < kWarps ? scratch.warps[lane_index()] : T{});
}

// A tile is read by a block at once: kVectors vectors per thread, vector v of thread t at index v * kThreads + t, so that each read
// of the block is contiguous. Its counts, at most 8 per vector, are scanned four to a word.
template <int kVectors>
struct TileCounts {
  static_assert(kVectors % 4 == 0, "four counts share a word");
  uint64_t words[kVectors / 4] = {};

  __device__ void set(int vector, unsigned count) { words[vector / 4] |= uint64_t{count} << 16 * (vector % 4); }
  __device__ unsigned operator[](int vector) const {
    return static_cast<unsigned>(words[vector / 4] >> 16 * (vector % 4)) & 0xffffu;
  }
};

// Replaces the counts of a tile's vectors by their exclusive prefix sums, and returns their total.
template <int kThreads, int kVectors>
__device__ inline unsigned scan_tile(TileCounts<kVectors>& counts, ScanScratch<kThreads, uint64_t>& scratch) {
  static_assert(8 * kThreads * kVectors <= 1 << 16, "what is counted before a vector fits its 16 bits");
  unsigned earlier = 0;
#pragma unroll
  for (uint64_t& word : counts.words) {
    const Scan<uint64_t> scan = block_scan<kThreads>(word, scratch);
    word = scan.before;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word += uint64_t{earlier} << 16 * i;
      earlier += static_cast<unsigned>(scan.total >> 16 * i) & 0xffffu;
    }
  }
  return earlier;
}

}  // namespace sparsekern::cuda
