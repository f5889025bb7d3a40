// nm_q4_linear for 2:4 weights and at most 16 tokens: whole numbers on the sparse tensor cores. It has not run on a GPU yet.
//
// Floor, on an H200: the packed bytes at 4.8 TB/s, 13/64 of a dense weight's of 16 bits; [11008, 4096] takes 3.8 us, the dense weight
// 18.8 us. In that time a multiprocessor has 5 instructions for each stored value.
//
// * A first kernel rounds the tokens to 8 bits, once for all tiles of rows, and stores them in the order in which lanes read them.
// * Codes of 8 bits, values of 4 bits and their sums over a block of 64 columns are whole numbers that bfloat16 and float32 hold. A value
//   `q` from -8 to 7 becomes `q + 136`, which needs no conversion: 128 + (q + 8) has the stored bits of `q` as its lowest. A second
//   product, by ones at the same positions, says how much of the sum that is.
// * A tile of 16 rows is two strips of the layout. A block has four quarters of 16 columns. Lane t of a row takes the groups 2 w and
//   2 w + 1 of the quarters 2 p and 2 p + 1, with p = t % 2 and w = t / 2: four bytes of values, and positions that two shifts bring
//   together.
#include "common/nm_q4.h"

#include <cmath>

#include "cuda/decode.cuh"
#include "cuda/tensor_core.cuh"

namespace sparsekern::cuda {

namespace {

using nm_q4::kColumns;

constexpr nm_q4::Layout kLayout{2, 4};
constexpr int kBlockBytes = static_cast<int>(kLayout.bytes());
constexpr int kScalesAt = static_cast<int>(kLayout.scales_at());
constexpr int kStripRows = static_cast<int>(kLayout.rows());
constexpr int kStrips = 2;  // of a tile
constexpr int kStepBlocks = 4;
constexpr int kStripBytes = kStepBlocks * kBlockBytes;  // of a step
constexpr int kStageBytes = kStrips * kStripBytes;
constexpr int kStages = 4;
constexpr int kWarps = 4;
constexpr int kWords = 32;  // of the codes of a token and block: two columns each
static_assert(kStripRows * kStrips == kDecodeRows && kBlockBytes % 16 == 0, "copies are of 16 bytes");

// A token's codes and scales.
struct Codes {
  const uint4* words;   // [tokens, blocks, 8]
  const float* scales;  // [tokens, blocks]
};

// Returns where a lane's columns 2 l and 2 l + 1 of a block lie among its words: lane, product and register of the tensor cores.
__device__ int place_of(int l) {
  const int reader = l % 2 + l / 16 * 2, product = l / 8 % 2, word = l / 4 % 2 + l / 2 % 2 * 2;
  return 8 * reader + 4 * product + word;
}

__device__ uint32_t code_of(float value, float scale) {
  return from_float<BFloat16>(scale > 0 ? rintf(fminf(fmaxf(value / scale, -127.0f), 127.0f)) : 0.0f).bits;
}

// A warp for each token and 64 columns.
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp) round_tokens(const Decode call, uint32_t* words, float* scales) {
  const int64_t across = call.columns / kColumns, block = int64_t{blockIdx.x} * kWarps + warp_index();
  if (block >= across) return;
  const int lane = lane_index();
  const T* own = static_cast<const T*>(call.x) + int64_t{blockIdx.y} * call.columns + block * kColumns + 2 * lane;
  const float values[2] = {to_float(own[0]), to_float(own[1])};
  float most = fmaxf(fabsf(values[0]), fabsf(values[1]));
  const bool finite = __all_sync(kWholeWarp, fabsf(values[0]) < INFINITY && fabsf(values[1]) < INFINITY);
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(kWholeWarp, most, step));
  const float scale = most / 127.0f, usable = finite ? scale : 0.0f;
  const int64_t place = int64_t{blockIdx.y} * across + block;
  words[place * kWords + place_of(lane)] = code_of(values[0], usable) | code_of(values[1], usable) << 16;
  if (lane == 0) scales[place] = finite ? scale : NAN;
}

// What a lane reads of the tokens. For those past the last it reads the last again; their sums are not stored.
template <int kGroups>
struct Factors {
  const uint4* words[kGroups];
  const float* scales[kGroups][2];

  __device__ Factors(const Codes& codes, int64_t across, int tokens, int64_t first_block) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      words[group] = codes.words + (min(8 * group + g, tokens - 1) * across + first_block) * (kWords / 4) + 2 * t;
#pragma unroll
      for (int i = 0; i < 2; ++i) scales[group][i] = codes.scales + min(8 * group + 2 * t + i, tokens - 1) * across + first_block;
    }
  }

  __device__ void advance(int blocks) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      words[group] += blocks * (kWords / 4), scales[group][0] += blocks, scales[group][1] += blocks;
    }
  }
};

// Begins to copy a step of both strips. The last strip is read twice where a tile has only one.
__device__ void copy_step(unsigned char* stage, const unsigned char* const (&strips)[kStrips], int step, int blocks) {
  const int vectors = blocks * (kBlockBytes / 16);
#pragma unroll
  for (int strip = 0; strip < kStrips; ++strip) {
    const unsigned char* from = strips[strip] + int64_t{step} * kStripBytes;
#pragma unroll 2
    for (int i = lane_index(); i < vectors; i += kWarp) copy_async(stage + strip * kStripBytes + 16 * i, from + 16 * i);
  }
}

// Multiplies block `i` of a step.
template <int kGroups>
__device__ __forceinline__ void multiply_block(
    float (&sums)[kGroups][4], const unsigned char* stage, const Factors<kGroups>& factors, int i) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const unsigned half = t % 2 == 0 ? 0x5410u : 0x7632u;
  uint32_t even[4], odd[4], positions[kStrips];  // of the quarters 2 p and 2 p + 1
  float row_scales[kStrips];
#pragma unroll
  for (int strip = 0; strip < kStrips; ++strip) {
    const unsigned char* own = stage + strip * kStripBytes + i * kBlockBytes;
    const auto values = *reinterpret_cast<const uint32_t*>(own + 64 + 64 * (t % 2) + 8 * g + 4 * (t / 2));
    const uint32_t lows = values & 0x0f0f0f0fu, highs = values >> 4 & 0x0f0f0f0fu;
    even[strip] = __byte_perm(lows, 0x43434343u, 0x4140);  // 0x4300 is 128 in bfloat16
    even[2 + strip] = __byte_perm(lows, 0x43434343u, 0x4342);
    odd[strip] = __byte_perm(highs, 0x43434343u, 0x4140);
    odd[2 + strip] = __byte_perm(highs, 0x43434343u, 0x4342);
    // Two bits of every four, of the four bytes of groups t % 2 and t % 2 + 2; in the end those of the quarters are side by side.
    const auto bytes = *reinterpret_cast<const uint2*>(own + 8 * g);
    const uint32_t apart = __byte_perm(bytes.x, bytes.y, half) >> 2 * (t / 2) & 0x33333333u;
    positions[strip] = (apart | apart >> 6) & 0x00ff00ffu;
    row_scales[strip] = to_float(*reinterpret_cast<const Half*>(own + kScalesAt + 2 * g));
  }
  const uint32_t both = __byte_perm(positions[0], positions[1], 0x6420);
  constexpr uint32_t kOnes[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const uint4 low = factors.words[group][i * (kWords / 4)], high = factors.words[group][i * (kWords / 4) + 1];
    const uint32_t first[4] = {low.x, low.y, low.z, low.w}, second[4] = {high.x, high.y, high.z, high.w};
    float shifted[4] = {}, picked[4] = {};
    multiply_add_sparse<BFloat16, 0>(shifted, even, first, both);
    multiply_add_sparse<BFloat16, 0>(picked, kOnes, first, both);
    multiply_add_sparse<BFloat16, 1>(shifted, odd, second, both);
    multiply_add_sparse<BFloat16, 1>(picked, kOnes, second, both);
    const float scales[2] = {factors.scales[group][0][i], factors.scales[group][1][i]};
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[group][j] += (shifted[j] - 136.0f * picked[j]) * (row_scales[j / 2] * scales[j % 2]);
  }
}

template <class T, int kGroups>
__global__ void __launch_bounds__(kWarps* kWarp)
    multiply(const Decode call, const unsigned char* __restrict__ blocks, const Codes codes) {
  unsigned char* shared = dynamic_shared<unsigned char>();
  unsigned char* stages = shared + warp_index() * kStages * kStageBytes;
  const int across = static_cast<int>(call.columns / kColumns);
  const int64_t first_row = int64_t{blockIdx.x} * kDecodeRows, last_strip = (call.rows - 1) / kStripRows;
  const unsigned char* strips[kStrips];
#pragma unroll
  for (int strip = 0; strip < kStrips; ++strip) {
    strips[strip] = blocks + min(int64_t{blockIdx.x} * kStrips + strip, last_strip) * across * kBlockBytes;
  }
  const Steps steps(
      (across + kStepBlocks - 1) / kStepBlocks, static_cast<int>(blockIdx.y) * kWarps + uniform_warp_index(),
      static_cast<int>(gridDim.y) * kWarps);
  // Begins to copy a step, as a group of copies; a group past the last step is empty.
  const auto copy = [&](int step) {
    unsigned char* stage = stages + (step - steps.first) % kStages * kStageBytes;
    if (step < steps.last) copy_step(stage, strips, step, min(kStepBlocks, across - step * kStepBlocks));
    commit_copies();
  };
  for (int i = 0; i < kStages - 1; ++i) copy(steps.first + i);
  Factors<kGroups> factors(codes, across, call.tokens, int64_t{steps.first} * kStepBlocks);
  float sums[kGroups][4] = {};
#pragma unroll 1
  for (int step = steps.first; step < steps.last; ++step) {
    copy(step + kStages - 1);
    wait_for_copies<kStages - 1>();
    __syncwarp();  // what other lanes copied may be read
    const unsigned char* stage = stages + (step - steps.first) % kStages * kStageBytes;
    const int blocks = min(kStepBlocks, across - step * kStepBlocks);
    if (blocks == kStepBlocks) {
#pragma unroll
      for (int i = 0; i < kStepBlocks; ++i) multiply_block<kGroups>(sums, stage, factors, i);
    } else {
#pragma unroll 1
      for (int i = 0; i < blocks; ++i) multiply_block<kGroups>(sums, stage, factors, i);
    }
    factors.advance(kStepBlocks);
    __syncwarp();  // all have read what a later step replaces
  }
  store_tile<T, kGroups>(sums, reinterpret_cast<float*>(shared), call, [&](int row) {
    return first_row + row < call.rows ? first_row + row : int64_t{-1};
  });
}

int64_t blocks_of(const Decode& call) { return call.tokens * (call.columns / kColumns); }

int splits_of(const Decode& call) {
  return decode_splits(call.rows, (call.columns / kColumns + kStepBlocks - 1) / kStepBlocks, kWarps);
}

template <class T, int kGroups>
void multiply_as(const Decode& call, const void* blocks, const Codes& codes, cudaStream_t stream) {
  const int splits = splits_of(call);
  const dim3 grid(static_cast<unsigned>(decode_tiles(call.rows)), static_cast<unsigned>(splits));
  const size_t bytes = size_t{kWarps} * kStages * kStageBytes;
  launch_shared(
      multiply<T, kGroups>, grid, dim3(kWarps * kWarp), bytes, stream, call, static_cast<const unsigned char*>(blocks), codes);
  launch_add_splits<T>(call, splits, stream);
}

template <class T>
void multiply_any(Decode call, const void* blocks, cudaStream_t stream) {
  auto* words = reinterpret_cast<uint32_t*>(call.partials);
  float* scales = call.partials + kWords * blocks_of(call);
  call.partials = scales + blocks_of(call);
  const dim3 grid(static_cast<unsigned>((call.columns / kColumns + kWarps - 1) / kWarps), static_cast<unsigned>(call.tokens));
  launch(round_tokens<T>, grid, dim3(kWarps * kWarp), stream, call, words, scales);
  const Codes codes{reinterpret_cast<const uint4*>(words), scales};
  if (call.tokens <= 8) return multiply_as<T, 1>(call, blocks, codes, stream);
  multiply_as<T, 2>(call, blocks, codes, stream);
}

}  // namespace

int64_t nm_q4_linear_workspace(const Decode& call) {
  return (kWords + 1) * blocks_of(call) + decode_workspace(call, splits_of(call));
}

void nm_q4_linear(const Decode& call, const void* blocks, cudaStream_t stream) {
  switch (call.dtype) {
    case DType::bf16: return multiply_any<BFloat16>(call, blocks, stream);
    case DType::f16: return multiply_any<Half>(call, blocks, stream);
    case DType::f32: return multiply_any<float>(call, blocks, stream);
  }
}

}  // namespace sparsekern::cuda
