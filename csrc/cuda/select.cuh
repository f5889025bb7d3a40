// Exact selection without sorting: the k highest of many scores; of equal ones the first.
//
// The k-th key is found by radix, from the top digit down. Each step counts one digit of the keys that share the known digits, and
// finds the digit at which k is reached. Counts are integers, so that no result depends on the order of threads or blocks.
// select_in_block handles the keys of one block, select_in_grid those of all blocks of a cooperative launch. Both take
// `each_key(f)`, which calls f(rank) for every key of the block, and may be called repeatedly.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/order_key.h"
#include "cuda/block.h"
#include "cuda/launch.h"

namespace sparsekern::cuda {

// Returns the keys of the scores in a word, one float32 (Bits is uint32_t) or two 16-bit scores (uint16_t). A key has as many bits
// as its score and is lower for higher scores: the greatest magnitude minus the order key. There is no branch, and no carry between
// the scores.
template <class Bits>
SPARSEKERN_HOST_DEVICE constexpr uint32_t ranks_of(uint32_t word) {
  constexpr uint32_t kAll = static_cast<Bits>(~Bits{0}), kOnes = 0xffffffffu / kAll;
  const uint32_t negative = word >> (8 * sizeof(Bits) - 1) & kOnes;  // 1 for each score below or equal to -0
  const uint32_t chosen = negative * kAll;
  return ((word - negative) & chosen) | ((word ^ kOnes * (kAll >> 1)) & ~chosen);
}

SPARSEKERN_HOST_DEVICE constexpr uint32_t rank_of(uint32_t float_bits) { return ranks_of<uint32_t>(float_bits); }

constexpr bool ranks_are_order_keys(uint32_t float_bits, uint16_t half_bits) {
  const auto order32 = order_key(static_cast<int32_t>(float_bits), static_cast<int32_t>(float_bits & 0x7fffffffu));
  const auto order16 = order_key(static_cast<int16_t>(half_bits), half_bits & 0x7fff);
  return rank_of(float_bits) == 0x7fffffffu - static_cast<uint32_t>(order32) &&
         ranks_of<uint16_t>(uint32_t{half_bits} << 16 | 0x8000u) == ((0x7fffu - static_cast<uint32_t>(order16)) << 16 | 0x7fffu);
}
static_assert(ranks_are_order_keys(0, 0) && ranks_are_order_keys(0x80000000u, 0x8000), "both zeros are equal");
static_assert(ranks_are_order_keys(1, 1) && ranks_are_order_keys(0x80000001u, 0x8001), "a subnormal of each sign");
static_assert(ranks_are_order_keys(0x7f800000u, 0x7c00) && ranks_are_order_keys(0xff800000u, 0xff80), "infinities");
static_assert(ranks_are_order_keys(0x3f8abcdeu, 0x3f8a) && ranks_are_order_keys(0xbf8abcdeu, 0xbf8a), "a number of each sign");

// The cut below the best: kept are the keys below `key`, and the first `needed` of the `equal` keys equal to it; needed is at most
// equal.
struct Cut {
  uint32_t key;
  uint32_t needed, equal;

  // Returns whether only some of the equal keys are kept.
  __device__ bool splits_ties() const { return needed != 0 && needed != equal; }
  // Returns the limit below which ranks are kept, with or without the ties. No rank has all bits set.
  __device__ uint32_t limit(bool with_ties) const { return with_ties && key != ~0u ? key + 1 : key; }
};

// A digit of a key: the bits from `shift` up to the known ones.
struct Digit {
  int shift, bits;
};

template <int kDigitBits>
SPARSEKERN_HOST_DEVICE constexpr Digit digit_below(int known_from) {
  return known_from > kDigitBits ? Digit{known_from - kDigitBits, kDigitBits} : Digit{0, known_from};
}

// Counts of a digit's values in shared memory, padded so that the threads' runs of consecutive values share no bank.
template <int kThreads, int kDigitBits>
class Bins {
 public:
  static constexpr uint32_t kBins = 1u << kDigitBits;
  static_assert(kBins >= kThreads, "every thread clears and searches bins of its own");
  static constexpr uint32_t kEach = kBins > kThreads ? kBins / kThreads : 1;  // bins per thread

  __device__ void clear() {
#pragma unroll
    for (uint32_t i = 0; i < kEach; ++i) counts_[place(first_of_thread()) + i] = 0;
  }
  __device__ void add(uint32_t bin) { atomicAdd(&counts_[place(bin)], 1u); }
  __device__ uint32_t operator[](uint32_t bin) const { return counts_[place(bin)]; }

  __device__ static uint32_t first_of_thread() { return threadIdx.x * kEach; }

 private:
  static constexpr uint32_t kPadding = kEach > 1 ? 1 : 0;  // an odd pitch

  __device__ static uint32_t place(uint32_t bin) { return bin + bin / kEach * kPadding; }

  uint32_t counts_[kBins + kBins / kEach * kPadding];
};

template <class Count>
struct Found {
  uint32_t digit;
  Count needed, equal;  // among the keys with this digit
};

// The shared memory of a selection whose counts are of type Count.
template <int kThreads, int kDigitBits, class Count>
struct SelectScratch {
  Bins<kThreads, kDigitBits> bins;
  ScanScratch<kThreads, Count> scan;
  Found<Count> found;
};

// Counts a digit of the block's keys that agree with `known` in all higher bits.
template <int kThreads, int kDigitBits, class EachKey>
__device__ inline void count_digit(Bins<kThreads, kDigitBits>& bins, Digit digit, uint32_t known, const EachKey& each_key) {
  const uint32_t count = 1u << digit.bits;
  bins.clear();
  __syncthreads();
  each_key([&](uint32_t rank) {
    const uint32_t value = (rank ^ known) >> digit.shift;  // has higher bits set if the key differs
    if (value < count) bins.add(value);
  });
  __syncthreads();
}

// Finds the digit at which `needed` keys are reached, counting from the lowest. `count_of(bin)` returns the number of keys with the
// digit `bin`; their total is at least `needed`.
template <int kThreads, int kDigitBits, class Count, class CountOf>
__device__ inline Found<Count> find_digit(
    Count needed, SelectScratch<kThreads, kDigitBits, Count>& scratch, const CountOf& count_of) {
  constexpr uint32_t kEach = Bins<kThreads, kDigitBits>::kEach;
  const uint32_t first = Bins<kThreads, kDigitBits>::first_of_thread();
  Count sum = 0;
#pragma unroll
  for (uint32_t i = 0; i < kEach; ++i) sum += count_of(first + i);
  Count before = block_scan<kThreads>(sum, scratch.scan).before;
  if (before < needed && needed <= before + sum) {
    // Read again instead of kept: by one thread, all at once.
#pragma unroll
    for (uint32_t i = 0; i < kEach; ++i) {
      const Count here = count_of(first + i);
      if (before < needed && needed <= before + here) scratch.found = {first + i, needed - before, here};
      before += here;
    }
  }
  __syncthreads();
  return scratch.found;
}

// Progress of a selection: the known bits of the k-th key, and the number still to find among the keys that share them.
template <class Count>
struct Progress {
  uint32_t known;
  int known_from;
  Count needed, equal;

  __device__ bool ended() const { return known_from == 0 || needed == equal; }
  __device__ void add(const Found<Count>& found, Digit digit) {
    *this = {known | found.digit << digit.shift, digit.shift, found.needed, found.equal};
  }
  // Returns the last of the keys that share the known bits.
  __device__ uint32_t key() const { return known | static_cast<uint32_t>((uint64_t{1} << known_from) - 1); }
};

// Returns the cut that keeps the `k` best of the block's `count` keys of `key_bits` bits, a compile-time constant. The first step
// is compiled separately, because it compares no keys.
template <int kThreads, int kDigitBits, class EachKey>
__device__ inline Cut select_in_block(
    int key_bits, uint32_t k, uint32_t count, SelectScratch<kThreads, kDigitBits, uint32_t>& scratch, const EachKey& each_key) {
  if (k == 0) return {0, 0, 0};
  Progress<uint32_t> progress = {0, key_bits, k, count};
  const auto step = [&](Digit digit, uint32_t known) {
    count_digit(scratch.bins, digit, known, each_key);
    progress.add(find_digit(progress.needed, scratch, [&](uint32_t bin) { return scratch.bins[bin]; }), digit);
  };
  if (!progress.ended()) step(digit_below<kDigitBits>(key_bits), 0);
#pragma unroll 1
  while (!progress.ended()) step(digit_below<kDigitBits>(progress.known_from), progress.known);
  return {progress.key(), progress.needed, progress.equal};
}

// Device memory through which the blocks of a grid exchange counts while they select: cleared before use, and used once.
template <int kDigitBits>
struct GridSelection {
  unsigned long long* totals;  // [steps of the key][2^kDigitBits]: the counts of all blocks
  uint32_t* own;               // [blocks][2^bits of the last digit]: last counts of each block; need not be cleared

  SPARSEKERN_HOST_DEVICE static constexpr int steps(int key_bits) { return (key_bits + kDigitBits - 1) / kDigitBits; }
  SPARSEKERN_HOST_DEVICE static constexpr int last_bits(int key_bits) { return key_bits - (steps(key_bits) - 1) * kDigitBits; }
};

// As select_in_block, for the keys of all blocks of a cooperative launch. Keys of a lower block come before those of a higher one.
// Each block gets its own cut: `needed` and `equal` are its share of the ties. `barriers` counts the calls of grid_barrier that the
// kernel has made on `arrivals`.
template <int kThreads, int kDigitBits, class EachKey>
__device__ inline Cut select_in_grid(
    int key_bits, uint64_t k, uint64_t count, const GridSelection<kDigitBits>& grid, unsigned* arrivals, unsigned& barriers,
    SelectScratch<kThreads, kDigitBits, uint64_t>& scratch, const EachKey& each_key) {
  const int last_bits = GridSelection<kDigitBits>::last_bits(key_bits);
  if (k == 0) return {0, 0, 0};
  Progress<uint64_t> progress = {0, key_bits, k, count};
  unsigned long long* totals = grid.totals;
  uint32_t digit_found = 0;
  const auto step = [&](Digit digit, uint32_t known) {
    count_digit(scratch.bins, digit, known, each_key);
    for (uint32_t bin = threadIdx.x; bin < 1u << digit.bits; bin += kThreads) {
      const uint32_t own = scratch.bins[bin];
      if (own != 0) atomicAdd(totals + bin, static_cast<unsigned long long>(own));
      if (digit.shift == 0) grid.own[(uint64_t{blockIdx.x} << last_bits) + bin] = own;
    }
    grid_barrier(arrivals, ++barriers);
    // Bypasses L1, which does not see the writes of other blocks.
    const auto found = find_digit(progress.needed, scratch, [&](uint32_t bin) { return uint64_t{__ldcg(totals + bin)}; });
    progress.add(found, digit);
    digit_found = found.digit;
    totals += 1 << kDigitBits;
  };
  if (!progress.ended()) step(digit_below<kDigitBits>(key_bits), 0);
#pragma unroll 1
  while (!progress.ended()) step(digit_below<kDigitBits>(progress.known_from), progress.known);
  if (progress.needed == progress.equal) return {progress.key(), ~0u, ~0u};

  const uint32_t equal = scratch.bins[digit_found];
  uint64_t earlier = 0;
  for (unsigned block = threadIdx.x; block < blockIdx.x; block += kThreads) {
    earlier += __ldcg(grid.own + (uint64_t{block} << last_bits) + digit_found);
  }
  earlier = block_sum<kThreads>(earlier, scratch.scan);
  const uint64_t left = progress.needed > earlier ? progress.needed - earlier : 0;
  return {progress.key(), left < equal ? static_cast<uint32_t>(left) : equal, equal};
}

}  // namespace sparsekern::cuda
