// nm_linear for 2:4 weights of 16-bit values and at most 16 tokens: the packed layout is what the sparse tensor cores multiply.
//
// Floor, on an H200: the packed bytes at 4.8 TB/s, 9/16 of a dense weight's; [11008, 4096] takes 10.6 us, the dense weight 18.8 us. In
// that time a multiprocessor has 14 instructions for each stored value.
//
// * A block of the layout is 64 columns, and a code word the positions of 32 of them: mma.sp.m16n8k32 takes the codes as they are
//   stored. Of a slot, the low half belongs to the first 32 columns and the high half to the others, so that two byte permutations make
//   operands of two slots.
// * A warp takes steps of 256 columns, two parts of two blocks. It copies the next one by 16 bytes, with the columns of `x` that belong
//   to it, while it multiplies one.
#include "cuda/decode.cuh"
#include "cuda/tensor_core.cuh"

namespace sparsekern::cuda {

namespace {

constexpr int kPartColumns = 128;
constexpr int kParts = 2;  // of a step; the last step may have only one
constexpr int kWarps = 4;
constexpr int kValuesPitch = 128 + 32;  // bytes of a row of a step; rows begin in different banks
constexpr int kCodesPitch = 16;
constexpr int kXPitch = 2 * kPartColumns + 16;
constexpr int kCodesAt = kDecodeRows * kValuesPitch, kXAt = kCodesAt + kDecodeRows * kCodesPitch;

__host__ __device__ constexpr int part_bytes(int tokens) { return kXAt + tokens * kXPitch; }
__host__ __device__ constexpr int stage_bytes(int tokens) { return kParts * part_bytes(tokens); }

// What a warp copies, with the pointers of this lane.
struct Source {
  const unsigned char* values[4];  // 16 bytes of four rows
  const unsigned char* codes;
  const unsigned char* x;
  int64_t x_pitch;  // of two tokens
};

template <class T>
__device__ Source source_of(const Decode& call, const void* values, const uint32_t* codes, int64_t first_row) {
  const int lane = lane_index();
  const int64_t row_bytes = call.columns, code_bytes = call.columns / 8, x_bytes = 2 * call.columns;
  Source source;
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // rows after the last are read as the last, and not stored
    const int64_t row = min(first_row + lane / 8 + 4 * i, call.rows - 1);
    source.values[i] = static_cast<const unsigned char*>(values) + row * row_bytes + lane % 8 * 16;
  }
  source.codes = reinterpret_cast<const unsigned char*>(codes) + min(first_row + lane % 16, call.rows - 1) * code_bytes;
  source.x = static_cast<const unsigned char*>(call.x) + lane / 16 * x_bytes + lane % 16 * 16;
  source.x_pitch = 2 * x_bytes;
  return source;
}

__device__ void copy_step(unsigned char* stage, const Source& source, int64_t step, int parts, int tokens) {
  const int lane = lane_index(), bytes = part_bytes(tokens);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    if (part >= parts) break;
    unsigned char* to = stage + part * bytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned char* from = source.values[i] + step * (kParts * kPartColumns);
      copy_async(to + (lane / 8 + 4 * i) * kValuesPitch + lane % 8 * 16, from + part * kPartColumns);
    }
    const unsigned char* codes = source.codes + step * (kParts * kPartColumns / 8);
    if (lane < kDecodeRows) copy_async(to + kCodesAt + lane * kCodesPitch, codes + part * (kPartColumns / 8));
  }
  const unsigned char* x = source.x + step * (2 * kParts * kPartColumns);
  unsigned char* to = stage + kXAt + lane / 16 * kXPitch + lane % 16 * 16;
#pragma unroll 1
  for (int token = lane / 16; token < tokens; token += 2, x += source.x_pitch, to += 2 * kXPitch) {
    copy_async(to, x);
    if (parts == kParts) copy_async(to + bytes, x + 2 * kPartColumns);
  }
}

template <class T, int kGroups>
__device__ void multiply_part(float (&sums)[kGroups][4], const unsigned char* stage, int tokens) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const unsigned char* top = stage + g * kValuesPitch + 8 * t;
  const unsigned char* codes = stage + kCodesAt + g * kCodesPitch + t / 2 * 4;
  const unsigned half = t % 2 == 0 ? 0x5410u : 0x7632u;
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    uint2 slots[4];  // two of rows g and g + 8, then the two that are eight slots on
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      slots[i] = *reinterpret_cast<const uint2*>(top + i % 2 * 8 * kValuesPitch + i / 2 * 32 + block * 64);
    }
    uint32_t low[4], high[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low[i] = __byte_perm(slots[i].x, slots[i].y, 0x5410);
      high[i] = __byte_perm(slots[i].x, slots[i].y, 0x7632);
    }
    const uint32_t positions = __byte_perm(
        *reinterpret_cast<const uint32_t*>(codes + 8 * block),
        *reinterpret_cast<const uint32_t*>(codes + 8 * kCodesPitch + 8 * block), half);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int token = min(8 * group + lane % 8, tokens - 1);  // what is read for others is not stored
      const unsigned char* x = stage + kXAt + token * kXPitch + lane / 8 * 16 + block * 128;
      uint32_t factors[4];
      load_matrices(factors, x);
      multiply_add_sparse<T, 0>(sums[group], low, factors, positions);
      load_matrices(factors, x + 64);
      multiply_add_sparse<T, 1>(sums[group], high, factors, positions);
    }
  }
}

template <class T, int kGroups>
__global__ void __launch_bounds__(kWarps* kWarp)
    multiply(const Decode call, const void* __restrict__ values, const uint32_t* __restrict__ codes) {
  const int bytes = stage_bytes(call.tokens), parts = static_cast<int>(call.columns / kPartColumns);
  unsigned char* shared = dynamic_shared<unsigned char>();
  unsigned char* stages = shared + warp_index() * 2 * bytes;
  const int64_t first_row = int64_t{blockIdx.x} * kDecodeRows;
  const Source source = source_of<T>(call, values, codes, first_row);
  const Steps steps(
      (parts + kParts - 1) / kParts, static_cast<int>(blockIdx.y) * kWarps + uniform_warp_index(),
      static_cast<int>(gridDim.y) * kWarps);
  float sums[kGroups][4] = {};
  // Begins to copy a step, as a group of copies; the group past the last step is empty.
  const auto copy = [&](int step, int stage) {
    if (step < steps.last) copy_step(stages + stage * bytes, source, step, min(kParts, parts - step * kParts), call.tokens);
    commit_copies();
  };
  copy(steps.first, 0);
#pragma unroll 1
  for (int step = steps.first, stage = 0; step < steps.last; ++step, stage ^= 1) {
    copy(step + 1, stage ^ 1);
    wait_for_copies<1>();
    __syncwarp();  // what other lanes copied may be read
    const unsigned char* part = stages + stage * bytes;
    multiply_part<T, kGroups>(sums, part, call.tokens);
    if ((step + 1) * kParts <= parts) multiply_part<T, kGroups>(sums, part + part_bytes(call.tokens), call.tokens);
    __syncwarp();  // all have read what the next step replaces
  }
  store_tile<T, kGroups>(sums, reinterpret_cast<float*>(shared), call, [&](int row) {
    return first_row + row < call.rows ? first_row + row : int64_t{-1};
  });
}

int splits_of(const Decode& call) {
  const int64_t step = kParts * kPartColumns;
  return decode_splits(call.rows, (call.columns + step - 1) / step, kWarps);
}

template <class T, int kGroups>
void multiply_as(const Decode& call, const void* values, const uint32_t* codes, cudaStream_t stream) {
  const int splits = splits_of(call);
  const dim3 grid(static_cast<unsigned>(decode_tiles(call.rows)), static_cast<unsigned>(splits));
  const size_t bytes = size_t{kWarps} * 2 * stage_bytes(call.tokens);
  launch_shared(multiply<T, kGroups>, grid, dim3(kWarps * kWarp), bytes, stream, call, values, codes);
  launch_add_splits<T>(call, splits, stream);
}

template <class T>
void multiply_any(const Decode& call, const void* values, const uint32_t* codes, cudaStream_t stream) {
  if (call.tokens <= 8) return multiply_as<T, 1>(call, values, codes, stream);
  multiply_as<T, 2>(call, values, codes, stream);
}

}  // namespace

int64_t nm_linear_workspace(const Decode& call) { return decode_workspace(call, splits_of(call)); }

void nm_linear(const Decode& call, const void* values, const uint32_t* codes, cudaStream_t stream) {
  if (call.dtype == DType::bf16) return multiply_any<BFloat16>(call, values, codes, stream);
  multiply_any<Half>(call, values, codes, stream);
}

}  // namespace sparsekern::cuda
