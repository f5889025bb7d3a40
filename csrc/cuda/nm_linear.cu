// nm_linear for 2:4 and 1:4 weights of 16-bit values and at most 16 tokens, on the sparse tensor cores.
//
// Floor, on an H200: the packed bytes at 4.8 TB/s, 9/16 or 9/32 of a dense weight's; [11008, 4096] takes 10.6 or 5.3 us, the dense weight
// 18.8 us. In that time a multiprocessor has 14 instructions for each stored value.
//
// * mma.sp.m16n8k32 takes two values of every four columns and their positions. Of 2:4 it takes the codes as they are stored: a code
//   word is the positions of 32 columns. Of a slot, the low half belongs to the first half of a block and the high half to the other,
//   so that two byte permutations make operands of two slots.
// * Of 1:4 a zero goes in front of a value in the last of four columns and behind any other, in positions that ascend.
// * A warp takes steps of 256 columns. It copies the next one by 16 bytes, with the columns of `x` that belong to it, while it
//   multiplies one.
#include "cuda/decode.cuh"
#include "cuda/tensor_core.cuh"

namespace sparsekern::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kStepColumns = 256;
constexpr int kPartStored = 64;                                            // values of a row in a part: two blocks of the layout
constexpr int kPartBytes = 2 * kPartStored, kCodeBytes = kPartStored / 4;  // of a row
constexpr int kCodesPitch = kCodeBytes;

// The parts of a step in shared memory, for weights that keep `kKept` of four.
template <int kKept>
struct Part {
  static constexpr int kColumns = kPartStored / kKept * 4;
  static constexpr int kCount = kStepColumns / kColumns;                    // of a step; the last step may have only one
  static constexpr int kValuesPitch = kPartBytes + (kKept == 2 ? 32 : 16);  // rows begin in different banks
  static constexpr int kXPitch = 2 * kColumns + 16;
  static constexpr int kCodesAt = kDecodeRows * kValuesPitch, kXAt = kCodesAt + kDecodeRows * kCodesPitch;

  __host__ __device__ static constexpr int bytes(int tokens) { return kXAt + tokens * kXPitch; }
  __host__ __device__ static constexpr int stage_bytes(int tokens) { return kCount * bytes(tokens); }
};

// What a warp copies, with the pointers of this lane.
struct Source {
  const unsigned char* values[4];  // 16 bytes of four rows
  const unsigned char* codes;
  const unsigned char* x;
  int64_t x_pitch;  // of the tokens that are copied at once
};

template <int kKept>
constexpr int kXLanes = 2 * Part<kKept>::kColumns / 16;  // that copy the columns of a token

template <int kKept>
__device__ Source source_of(const Decode& call, const void* values, const uint32_t* codes, int64_t first_row) {
  const int lane = lane_index();
  const int64_t row_bytes = call.columns / 2 * kKept, code_bytes = row_bytes / 8, x_bytes = 2 * call.columns;
  Source source;
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // rows after the last are read as the last, and not stored
    const int64_t row = min(first_row + lane / 8 + 4 * i, call.rows - 1);
    source.values[i] = static_cast<const unsigned char*>(values) + row * row_bytes + lane % 8 * 16;
  }
  source.codes = reinterpret_cast<const unsigned char*>(codes) + min(first_row + lane % 16, call.rows - 1) * code_bytes;
  source.x = static_cast<const unsigned char*>(call.x) + lane / kXLanes<kKept> * x_bytes + lane % kXLanes<kKept> * 16;
  source.x_pitch = kWarp / kXLanes<kKept> * x_bytes;
  return source;
}

template <int kKept>
__device__ void copy_step(unsigned char* stage, const Source& source, int64_t step, int parts, int tokens) {
  using Part = Part<kKept>;
  constexpr int kTokens = kWarp / kXLanes<kKept>;  // at once
  const int lane = lane_index(), bytes = Part::bytes(tokens);
#pragma unroll
  for (int part = 0; part < Part::kCount; ++part) {
    if (part >= parts) break;
    unsigned char* to = stage + part * bytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned char* from = source.values[i] + step * (Part::kCount * kPartBytes);
      copy_async(to + (lane / 8 + 4 * i) * Part::kValuesPitch + lane % 8 * 16, from + part * kPartBytes);
    }
    const unsigned char* codes = source.codes + step * (Part::kCount * kCodeBytes);
    if (lane < kDecodeRows) copy_async(to + Part::kCodesAt + lane * kCodesPitch, codes + part * kCodeBytes);
  }
  const unsigned char* x = source.x + step * (2 * kStepColumns);
  unsigned char* to = stage + Part::kXAt + lane / kXLanes<kKept> * Part::kXPitch + lane % kXLanes<kKept> * 16;
#pragma unroll 1
  for (int token = lane / kXLanes<kKept>; token < tokens; token += kTokens, x += source.x_pitch, to += kTokens * Part::kXPitch) {
    copy_async(to, x);
    if (Part::kCount == 2 && parts == 2) copy_async(to + bytes, x + 2 * Part::kColumns);
  }
}

// Multiplies a part of a 2:4 weight.
template <class T, int kGroups>
__device__ void multiply_part(float (&sums)[kGroups][4], const unsigned char* stage, int tokens, Part<2>) {
  using Part = Part<2>;
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const unsigned char* top = stage + g * Part::kValuesPitch + 8 * t;
  const unsigned char* codes = stage + Part::kCodesAt + g * kCodesPitch + t / 2 * 4;
  const unsigned half = t % 2 == 0 ? 0x5410u : 0x7632u;
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    uint2 slots[4];  // two of rows g and g + 8, then the two that are eight slots on
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      slots[i] = *reinterpret_cast<const uint2*>(top + i % 2 * 8 * Part::kValuesPitch + i / 2 * 32 + block * 64);
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
      const unsigned char* x = stage + Part::kXAt + token * Part::kXPitch + lane / 8 * 16 + block * 128;
      uint32_t factors[4];
      load_matrices(factors, x);
      multiply_add_sparse<T, 0>(sums[group], low, factors, positions);
      load_matrices(factors, x + 64);
      multiply_add_sparse<T, 1>(sums[group], high, factors, positions);
    }
  }
}

// Returns the positions of two values in each of eight groups of 1:4, from a byte of four codes in bytes 0 and 1, and another in bytes 2
// and 3: those of the value, or 2 for a zero in front of the last column, then 3.
__device__ __forceinline__ uint32_t two_positions(uint32_t codes) {
  const uint32_t pairs = (codes & 0x000f000fu) | (codes >> 4 & 0x0f000f00u);
  const uint32_t single = (pairs | pairs << 2) & 0x33333333u;
  return (single & ~(single >> 1 & 0x11111111u)) | 0xccccccccu;
}

// Multiplies a part of a 1:4 weight.
template <class T, int kGroups>
__device__ void multiply_part(float (&sums)[kGroups][4], const unsigned char* stage, int tokens, Part<1>) {
  using Part = Part<1>;
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const unsigned char* top = stage + g * Part::kValuesPitch + 4 * t;
  const unsigned char* codes = stage + Part::kCodesAt + g * kCodesPitch;
  const unsigned byte = 0x4400u + 0x1111u * t;  // byte t of two words, twice each
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    uint32_t slots[2][4];  // t, t + 4, .. of rows g and g + 8
    uint2 words[2];        // codes of the low halves, and of the high halves
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        slots[row][i] = *reinterpret_cast<const uint32_t*>(top + row * 8 * Part::kValuesPitch + i * 16 + block * 64);
      }
      words[row] = *reinterpret_cast<const uint2*>(codes + row * 8 * kCodesPitch + 8 * block);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t above = half == 0 ? words[0].x : words[0].y, below = half == 0 ? words[1].x : words[1].y;
      const uint32_t positions = two_positions(__byte_perm(above, below, byte));
      const uint32_t last[2] = {(above & above >> 1) >> 2 * t, (below & below >> 1) >> 2 * t};  // bit 8 i: of slot t + 4 i
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const bool is_last = last[row] >> 8 * i & 1;
          const unsigned first = half == 0 ? 0x4410u : 0x4432u, second = half == 0 ? 0x1044u : 0x3244u;
          a[i / 2][row + i % 2 * 2] = __byte_perm(slots[row][i], 0, is_last ? second : first);
        }
      }
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int token = min(8 * group + lane % 8, tokens - 1);  // what is read for others is not stored
        const unsigned char* x = stage + Part::kXAt + token * Part::kXPitch + lane / 8 * 16 + block * 256 + half * 128;
        uint32_t factors[4];
        load_matrices(factors, x);
        multiply_add_sparse<T, 0>(sums[group], a[0], factors, positions);
        load_matrices(factors, x + 64);
        multiply_add_sparse<T, 1>(sums[group], a[1], factors, positions);
      }
    }
  }
}

template <class T, int kGroups, int kKept>
__global__ void __launch_bounds__(kWarps* kWarp)
    multiply(const Decode call, const void* __restrict__ values, const uint32_t* __restrict__ codes) {
  using Part = Part<kKept>;
  const int bytes = Part::stage_bytes(call.tokens), parts = static_cast<int>(call.columns / Part::kColumns);
  unsigned char* shared = dynamic_shared<unsigned char>();
  unsigned char* stages = shared + warp_index() * 2 * bytes;
  const int64_t first_row = int64_t{blockIdx.x} * kDecodeRows;
  const Source source = source_of<kKept>(call, values, codes, first_row);
  const Steps steps(
      (parts + Part::kCount - 1) / Part::kCount, static_cast<int>(blockIdx.y) * kWarps + uniform_warp_index(),
      static_cast<int>(gridDim.y) * kWarps);
  float sums[kGroups][4] = {};
  // Begins to copy a step, as a group of copies; the group past the last step is empty.
  const auto copy = [&](int step, int stage) {
    if (step < steps.last) {
      copy_step<kKept>(stages + stage * bytes, source, step, min(Part::kCount, parts - step * Part::kCount), call.tokens);
    }
    commit_copies();
  };
  copy(steps.first, 0);
#pragma unroll 1
  for (int step = steps.first, stage = 0; step < steps.last; ++step, stage ^= 1) {
    copy(step + 1, stage ^ 1);
    wait_for_copies<1>();
    __syncwarp();  // what other lanes copied may be read
    const unsigned char* part = stages + stage * bytes;
    multiply_part<T>(sums, part, call.tokens, Part{});
    if (Part::kCount == 2 && (step + 1) * 2 <= parts) multiply_part<T>(sums, part + Part::bytes(call.tokens), call.tokens, Part{});
    __syncwarp();  // all have read what the next step replaces
  }
  store_tile<T, kGroups>(sums, reinterpret_cast<float*>(shared), call, [&](int row) {
    return first_row + row < call.rows ? first_row + row : int64_t{-1};
  });
}

int splits_of(const Decode& call) { return decode_splits(call.rows, (call.columns + kStepColumns - 1) / kStepColumns, kWarps); }

template <class T, int kGroups, int kKept>
void multiply_as(const Decode& call, const void* values, const uint32_t* codes, cudaStream_t stream) {
  const int splits = splits_of(call);
  const dim3 grid(static_cast<unsigned>(decode_tiles(call.rows)), static_cast<unsigned>(splits));
  const size_t bytes = size_t{kWarps} * 2 * Part<kKept>::stage_bytes(call.tokens);
  launch_shared(multiply<T, kGroups, kKept>, grid, dim3(kWarps * kWarp), bytes, stream, call, values, codes);
  launch_add_splits<T>(call, splits, stream);
}

template <class T, int kKept>
void multiply_any(const Decode& call, const void* values, const uint32_t* codes, cudaStream_t stream) {
  if (call.tokens <= 8) return multiply_as<T, 1, kKept>(call, values, codes, stream);
  multiply_as<T, 2, kKept>(call, values, codes, stream);
}

template <class T>
void multiply_kept(const Decode& call, const void* values, const uint32_t* codes, int kept, cudaStream_t stream) {
  if (kept == 1) return multiply_any<T, 1>(call, values, codes, stream);
  multiply_any<T, 2>(call, values, codes, stream);
}

}  // namespace

int64_t nm_linear_workspace(const Decode& call) { return decode_workspace(call, splits_of(call)); }

void nm_linear(const Decode& call, const void* values, const uint32_t* codes, int kept, cudaStream_t stream) {
  if (call.dtype == DType::bf16) return multiply_kept<BFloat16>(call, values, codes, kept, stream);
  multiply_kept<Half>(call, values, codes, kept, stream);
}

}  // namespace sparsekern::cuda
