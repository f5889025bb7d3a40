// bitmask_linear for 16-bit values and at most 16 tokens.
//
// Floor, on an H200: the packed bytes at 4.8 TB/s, 2 d + 1/8 bytes a weight at a share d of non-zeros: [11008, 4096] takes 10.6 us at
// d = 1/2, the dense weight 18.8 us. In that time a multiprocessor has 7 instructions for each weight, zeros included, and takes 15
// weights a cycle out of shared memory.
//
// * The 16 rows of a tile are the rows of mma.m16n8k16, in the order 0, 2, .. 14, 1, 3, .. 15: the two rows that share slots are two
//   registers of one lane. The lane has 32 neighbouring columns of both, and walks along the slots of each: a value is read where a
//   bit is set, which moves the place by one slot.
// * A warp takes steps of 256 columns. It counts their bits, so that every 32 columns of a row have a record of their bits and of
//   their first slot, and copies the slots of the step by 16 bytes, a step ahead. The two rows of a group need the same slots, except
//   for a few at the ends.
// * Where those few are many (the zeros of the two rows lie very differently), or too many bits are set, the step is made of shorter
//   ones, which always fit.
#include "common/packed_rows.h"
#include "cuda/decode.cuh"
#include "cuda/status.h"
#include "cuda/tensor_core.cuh"

namespace sparsekern::cuda {

namespace {

using packed_rows::kSlack;
using packed_rows::kTileRows;
using packed_rows::kWordColumns;

constexpr int kGroupsOfRows = 8;  // that share slots: two rows each
constexpr int kStepWords = 4;
constexpr int kUnitWords = 2;  // columns that a warp multiplies at once: 32 for each of four lanes
constexpr int kUnits = kStepWords / kUnitWords;
constexpr int kWindow = 184;                        // slots of a group that a step has room for: at d = 1/2 it needs about 128 + 30
constexpr int kUnitPitch = 4 * kTileRows * 8 + 16;  // bytes of the records of a unit: 8 for every 32 columns of a row
constexpr int kRecordsAt = kGroupsOfRows * kWindow * 4;
constexpr int kStageBytes = kRecordsAt + kUnits * kUnitPitch;
constexpr int kStages = 2;  // one is multiplied while the other is copied
constexpr int kWarps = 8;
static_assert(kStageBytes % 16 == 0 && kWindow % 4 == 0, "copies are of 16 bytes");
static_assert(kWindow >= kUnitWords * kWordColumns + 3, "one row of a unit fits, wherever its first slot lies");

__device__ int steps_of(const Decode& call) {
  return static_cast<int>((packed_rows::words(call.columns) + kStepWords - 1) / kStepWords);
}

// The bits of the tile's rows. Lane 2 r + h reads words 2 h and 2 h + 1 of a step in row r.
struct Bits {
  const uint64_t* row;  // of this lane
  int words;
  bool exists;

  __device__ Bits(const Decode& call, const DecodeBitmask& weight, int64_t first_row)
      : words(static_cast<int>(packed_rows::words(call.columns))) {
    const int64_t own = first_row + lane_index() / 2;
    exists = own < call.rows;
    row = weight.bits + own * words;
  }

  // Returns the bits of 128 columns from `word`, an even number; zeros past the end.
  __device__ uint4 read(int word) const {
    if (!exists || word >= words) return make_uint4(0, 0, 0, 0);
    if (words % 2 == 0) return *reinterpret_cast<const uint4*>(row + word);
    const uint2 low = *reinterpret_cast<const uint2*>(row + word);  // rows of an odd number of words are not aligned
    const uint2 high = word + 1 < words ? *reinterpret_cast<const uint2*>(row + word + 1) : make_uint2(0, 0);
    return make_uint4(low.x, low.y, high.x, high.y);
  }
};

__device__ int count(const uint4& bits) { return __popc(bits.x) + __popc(bits.y) + __popc(bits.z) + __popc(bits.w); }

// Where the values of a warp's steps begin, for the row and the group of this lane.
struct Begin {
  int rank;      // bits of the row before the steps of the warp
  int64_t base;  // first slot of the group
};

// Counts the bits of the tile. `counts`, in shared memory, has 16 numbers for each range of steps of the tile's warps.
__device__ Begin find_begin(const Decode& call, const DecodeBitmask& weight, const Bits& bits, int64_t tile, int* counts) {
  const int ranges = static_cast<int>(gridDim.y) * kWarps, half = lane_index() % 2, row = lane_index() / 2;
  for (int range = warp_index(); range < ranges; range += kWarps) {
    const Steps steps(steps_of(call), range, ranges);
    int ones = 0;
    for (int step = steps.first; step < steps.last; ++step) ones += count(bits.read(step * kStepWords + half * kUnitWords));
    ones += __shfl_xor_sync(kWholeWarp, ones, 1);
    if (half == 0) counts[range * kTileRows + row] = ones;
  }
  __syncthreads();
  const int own = static_cast<int>(blockIdx.y) * kWarps + uniform_warp_index();
  int rank = 0, total = 0;
  for (int range = 0; range < ranges; ++range) {
    const int ones = counts[range * kTileRows + row];
    rank += range < own ? ones : 0;
    total += ones;
  }
  const int longest = max(total, __shfl_xor_sync(kWholeWarp, total, 2));  // of the two rows of a group: four lanes
  int through = longest;
#pragma unroll
  for (int lanes = 4; lanes < kWarp; lanes *= 2) {
    const int below = __shfl_up_sync(kWholeWarp, through, lanes);
    if (lane_index() >= lanes) through += below;
  }
  const int64_t slots = weight.slot_count - kSlack;
  const int64_t start = weight.starts[tile];
  if (weight.status != nullptr && own == 0) {
    const int64_t end = weight.starts[tile + 1];
    const int64_t needed = start + __shfl_sync(kWholeWarp, through, kWarp - 1);
    const int target = bits.exists ? weight.order[tile * kTileRows + row] : 0;
    if (start < 0 || start > end || end > slots || needed > slots || target < 0 || target >= call.rows) {
      atomicOr(weight.status, static_cast<int>(kInconsistent));
    }
  }
  return {rank, min(max(start, int64_t{0}), slots) + through - longest};
}

// Makes the steps of a warp, in order.
class Maker {
 public:
  __device__ Maker(const DecodeBitmask& weight, const Bits& bits, const Begin& begin, const Steps& steps)
      : weight_(weight),
        bits_(bits),
        rank_(begin.rank),
        base_(begin.base),
        word_(steps.first * kStepWords),
        end_(min(steps.last * kStepWords, (bits.words + 1) / kUnitWords * kUnitWords)),
        short_until_(word_) {
    next_ = bits_.read(word_ + half() * kUnitWords);
  }

  // Begins to copy the next step into `stage`, as a group of copies, and writes its records. Returns its first word, or -1 at the end.
  __device__ int make_next(unsigned char* stage) {
    const int made = word_ < end_ ? make(stage) : -1;
    commit_copies();
    return made;
  }

 private:
  enum Rows { kBoth, kFirst, kSecond };  // of each group

  __device__ int make(unsigned char* stage) {
    uint4 bits;
    int start, row_ones, low, first;
    for (;;) {
      const bool is_short = word_ < short_until_;
      bits = next_;
      if (is_short && half() == 1) bits = make_uint4(0, 0, 0, 0);
      const int ones = count(bits), other = __shfl_xor_sync(kWholeWarp, ones, 1);
      row_ones = ones + other;
      start = rank_ + (half() == 1 ? other : 0);
      const bool hidden = only_ != kBoth && (lane_index() / 2 % 2 == 1) != (only_ == kSecond);
      if (hidden) bits = make_uint4(0, 0, 0, 0);
      low = hidden ? 0x7fffffff : rank_;
      int high = hidden ? 0 : rank_ + row_ones;
      low = min(low, __shfl_xor_sync(kWholeWarp, low, 2));
      high = max(high, __shfl_xor_sync(kWholeWarp, high, 2));
      const int64_t from = (base_ + low) / 4 * 4;
      first = static_cast<int>(base_ + low - from);
      const int needed = first + high - low;
      if (__all_sync(kWholeWarp, needed <= kWindow)) {
        copy(stage, from, needed);
        break;
      }
      short_until_ = min(word_ + kStepWords, end_);
      only_ = kFirst;
    }
    write_records(stage, bits, 4 * static_cast<uint32_t>(start - low + first));
    return advance(row_ones);
  }

  __device__ static int half() { return lane_index() % 2; }

  __device__ void copy(unsigned char* stage, int64_t from, int needed) const {
    const int group = lane_index() / 4, lane = lane_index() % 4;
    const int64_t inside = weight_.slot_count / 4 - from / 4;  // whatever the tensors hold
    const int vectors = static_cast<int>(min(int64_t{(needed + 3) / 4}, inside));
    const uint32_t* source = weight_.slots + from + 4 * lane;
    unsigned char* to = stage + group * (kWindow * 4) + 16 * lane;
#pragma unroll 4
    for (int i = lane; i < vectors; i += 4, source += 16, to += 64) copy_async(to, source);
  }

  // A record is the bits of 32 columns of a row, and the place of their first value in bytes from the group's first.
  __device__ void write_records(unsigned char* stage, const uint4& bits, uint32_t place) const {
    unsigned char* record = stage + kRecordsAt + half() * kUnitPitch + lane_index() / 2 * 8;
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      *reinterpret_cast<uint2*>(record + i * (kTileRows * 8)) = make_uint2(words[i], place);
      place += 4 * static_cast<uint32_t>(__popc(words[i]));
    }
  }

  __device__ int advance(int row_ones) {
    const int made = word_;
    if (only_ == kFirst) {
      only_ = kSecond;
      return made;
    }
    rank_ += row_ones;
    word_ += word_ < short_until_ ? kUnitWords : kStepWords;
    only_ = word_ < short_until_ ? kFirst : kBoth;
    if (word_ < end_) next_ = bits_.read(word_ + half() * kUnitWords);
    return made;
  }

  const DecodeBitmask& weight_;
  const Bits& bits_;
  int rank_;
  int64_t base_;
  int word_, end_, short_until_;
  Rows only_ = kBoth;
  uint4 next_;
};

// Returns the next two columns of a row as a register of the tensor cores, and moves `place` past their values. A place counts from
// the beginning of shared memory, which is a constant of the instruction that reads.
__device__ __forceinline__ uint32_t next_two(uint32_t& place, uint32_t bits, int column) {
  const unsigned char* shared = dynamic_shared<unsigned char>();
  uint32_t low = 0, high = 0;
  if (bits >> column & 1) {
    low = *reinterpret_cast<const uint16_t*>(shared + place);
    place += 4;
  }
  if (bits >> (column + 1) & 1) {
    high = *reinterpret_cast<const uint16_t*>(shared + place);
    place += 4;
  }
  return __byte_perm(low, high, 0x5410);
}

// Multiplies the 128 columns of a unit of which `word` is the first word.
template <class T, int kGroups>
__device__ void multiply_unit(float (&sums)[kGroups][4], const unsigned char* stage, int unit, int word, const Decode& call) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const int64_t column = int64_t{word} * kWordColumns + 32 * t;
  uint4 factors[kGroups][4];
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int token = 8 * group + g;
    const auto* x = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(call.x) + token * call.columns + column);
    const bool here = token < call.tokens && column < call.columns;
#pragma unroll
    for (int i = 0; i < 4; ++i) factors[group][i] = here ? x[i] : make_uint4(0, 0, 0, 0);
  }
  const uint4 record = *reinterpret_cast<const uint4*>(stage + kRecordsAt + unit * kUnitPitch + t * (kTileRows * 8) + g * 16);
  const auto slots = static_cast<uint32_t>(stage - dynamic_shared<unsigned char>()) + g * (kWindow * 4);
  uint32_t first = slots + record.y, second = slots + record.w + 2;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    uint32_t a[4];
    a[0] = next_two(first, record.x, 4 * i);
    a[1] = next_two(second, record.z, 4 * i);
    a[2] = next_two(first, record.x, 4 * i + 2);
    a[3] = next_two(second, record.z, 4 * i + 2);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const uint4& four = factors[group][i / 2];
      const uint32_t b[2] = {i % 2 == 0 ? four.x : four.z, i % 2 == 0 ? four.y : four.w};
      multiply_add<T>(sums[group], a, b);
    }
  }
}

template <class T, int kGroups>
__global__ void __launch_bounds__(kWarps* kWarp, 2) multiply(const Decode call, const DecodeBitmask weight) {
  unsigned char* shared = dynamic_shared<unsigned char>();
  unsigned char* stages = shared + warp_index() * kStages * kStageBytes;
  const int64_t tile = blockIdx.x, first_row = tile * kTileRows;
  const Bits bits(call, weight, first_row);
  const Begin begin = find_begin(call, weight, bits, tile, reinterpret_cast<int*>(shared));
  __syncthreads();  // the counts are read, so that copies may take their place
  const int own = static_cast<int>(blockIdx.y) * kWarps + uniform_warp_index();
  Maker maker(weight, bits, begin, Steps(steps_of(call), own, static_cast<int>(gridDim.y) * kWarps));
  float sums[kGroups][4] = {};
  int here = maker.make_next(stages), next = maker.make_next(stages + kStageBytes);  // first words, or -1
  for (int stage = 0; here >= 0; stage ^= 1) {
    unsigned char* place = stages + stage * kStageBytes;
    wait_for_copies<1>();
    __syncwarp();
#pragma unroll 1
    for (int unit = 0; unit < kUnits; ++unit) {
      multiply_unit<T, kGroups>(sums, place, unit, here + unit * kUnitWords, call);
    }
    __syncwarp();  // all have read what the next step replaces
    here = next;
    next = maker.make_next(place);
  }
  store_tile<T, kGroups>(sums, reinterpret_cast<float*>(shared), call, [&](int in_tile) {
    const int64_t row = first_row + (in_tile < 8 ? 2 * in_tile : 2 * in_tile - 15);
    if (row >= call.rows) return int64_t{-1};
    const int64_t target = weight.order[row];
    return target >= 0 && target < call.rows ? target : int64_t{-1};
  });
}

int splits_of(const Decode& call) {
  return decode_splits(call.rows, (packed_rows::words(call.columns) + kStepWords - 1) / kStepWords, kWarps);
}

template <class T, int kGroups>
void multiply_as(const Decode& call, const DecodeBitmask& weight, cudaStream_t stream) {
  const int splits = splits_of(call);
  const dim3 grid(static_cast<unsigned>(decode_tiles(call.rows)), static_cast<unsigned>(splits));
  launch_shared(multiply<T, kGroups>, grid, dim3(kWarps * kWarp), size_t{kWarps} * kStages * kStageBytes, stream, call, weight);
  launch_add_splits<T>(call, splits, stream);
}

template <class T>
void multiply_any(const Decode& call, const DecodeBitmask& weight, cudaStream_t stream) {
  if (call.tokens <= 8) return multiply_as<T, 1>(call, weight, stream);
  multiply_as<T, 2>(call, weight, stream);
}

}  // namespace

int64_t bitmask_linear_workspace(const Decode& call) { return decode_workspace(call, splits_of(call)); }

void bitmask_linear(const Decode& call, const DecodeBitmask& weight, cudaStream_t stream) {
  if (call.dtype == DType::bf16) return multiply_any<BFloat16>(call, weight, stream);
  multiply_any<Half>(call, weight, stream);
}

}  // namespace sparsekern::cuda
