// nm_mask: the N largest of every M consecutive scores.
//
// Floor: one read of the scores and one byte written for each, 3 bytes per 16-bit score. At 4.3 TB/s an SM of an H200 has about 20
// instructions for each. Groups of 2, 4, 8 and 16 are ranked in the registers of one thread (cuda/rank_groups.cuh), in about 5, 8,
// 14 and 31 instructions. Each thread reads 64 bytes, 16 at a time. Other groups use shared memory, where every score is compared
// with all of its group: bound by arithmetic.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/rank_groups.cuh"
#include "cuda/status.h"

namespace sparsekern::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kBytesInFlight = 64;  // per thread

// The scores that a thread ranks at once: whole groups of at least 16 bytes.
template <class T, int M>
struct Chunk {
  static constexpr int kScores = M * static_cast<int>(sizeof(T)) > 16 ? M : 16 / static_cast<int>(sizeof(T));
  static constexpr int kVectors = kScores * static_cast<int>(sizeof(T)) / 16;
  static constexpr int kAtOnce = kBytesInFlight / (16 * kVectors);
};

// Returns four one-byte fields, each 1 where its rank is below n; `bound` is 0x7f + n in each.
__device__ __forceinline__ uint32_t below(uint32_t ranks, uint32_t bound) { return (bound - ranks) >> 7 & 0x01010101u; }

template <int kScores>
__device__ __forceinline__ void write_mask(const uint32_t (&ranks)[kRankWords<kScores>], uint32_t bound, uint8_t* mask) {
  uint32_t bytes[kScores / 4];
#pragma unroll
  for (int word = 0; word < kRankWords<kScores>; ++word) {
    const uint32_t even = below(ranks[word] & 0x0f0f0f0fu, bound), odd = below(ranks[word] >> 4 & 0x0f0f0f0fu, bound);
    bytes[2 * word] = __byte_perm(even, odd, 0x5140);
    if constexpr (kScores >= kRanksPerWord) bytes[2 * word + 1] = __byte_perm(even, odd, 0x7362);
  }
  if constexpr (kScores == 4) {
    *reinterpret_cast<uint32_t*>(mask) = bytes[0];
  } else if constexpr (kScores == 8) {
    *reinterpret_cast<uint2*>(mask) = make_uint2(bytes[0], bytes[1]);
  } else {
    *reinterpret_cast<uint4*>(mask) = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
  }
}

template <class T, int M>
__global__ void __launch_bounds__(kThreads)
    select_in_registers(const T* __restrict__ scores, int64_t chunks, uint32_t bound, uint8_t* __restrict__ mask, int* status) {
  using C = Chunk<T, M>;
  const int64_t first = int64_t{blockIdx.x} * (kThreads * C::kAtOnce) + threadIdx.x;
  ScoreWords<T, C::kScores> held[C::kAtOnce];
#pragma unroll
  for (int i = 0; i < C::kAtOnce; ++i) {
    const int64_t chunk = first + i * kThreads;
    if (chunk < chunks) held[i].read(scores + chunk * C::kScores);
  }
  bool nan = false;
#pragma unroll
  for (int i = 0; i < C::kAtOnce; ++i) {
    const int64_t chunk = first + i * kThreads;
    if (chunk >= chunks) continue;
    float values[C::kScores];
    nan |= to_floats(held[i], values);
    uint32_t ranks[kRankWords<C::kScores>];
    rank_groups<M>(values, ranks);
    write_mask<C::kScores>(ranks, bound, mask + chunk * C::kScores);
  }
  if (nan) atomicOr(status, static_cast<int>(kNotFinite));
}

constexpr int kStagedScores = 2048;

// Any M: a block holds the scores of several groups, and each thread ranks one score at a time.
template <class T>
__global__ void __launch_bounds__(kThreads)
    select_in_shared(const T* __restrict__ scores, int64_t groups, int n, int m, uint8_t* __restrict__ mask, int* status) {
  __shared__ float staged[kStagedScores + kStagedScores / 2];
  const int pitch = m | 1;  // odd: groups side by side begin in different banks
  const int64_t per_block = kStagedScores / m, first = blockIdx.x * per_block;
  const int count = static_cast<int>(min(per_block, groups - first)) * m;
  bool nan = false;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const float score = to_float(scores[first * m + i]);
    nan |= score != score;
    staged[i / m * pitch + i % m] = score;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const float* group = staged + i / m * pitch;
    const int own = i % m;
    const float score = group[own];
    int rank = 0;
    for (int j = 0; j < m; ++j) rank += group[j] > score || (j < own && group[j] == score);
    mask[first * m + i] = rank < n;
  }
  if (nan) atomicOr(status, static_cast<int>(kNotFinite));
}

unsigned blocks_for(int64_t items, int64_t per_block) { return static_cast<unsigned>((items + per_block - 1) / per_block); }

template <class T>
void select_rest(const T* scores, int64_t groups, int n, int m, uint8_t* mask, int* status, cudaStream_t stream) {
  if (groups == 0) return;
  launch(
      select_in_shared<T>, dim3(blocks_for(groups, kStagedScores / m)), dim3(kThreads), stream, scores, groups, n, m, mask, status);
}

template <int M, class T>
void select_fast(const T* scores, int64_t groups, int n, uint8_t* mask, int* status, cudaStream_t stream) {
  using C = Chunk<T, M>;
  const int64_t chunks = groups * M / C::kScores, done = chunks * C::kScores;
  if (chunks != 0) {
    const dim3 grid(blocks_for(chunks, kThreads * C::kAtOnce));
    const uint32_t bound = (0x7fu + static_cast<uint32_t>(n)) * 0x01010101u;
    launch(select_in_registers<T, M>, grid, dim3(kThreads), stream, scores, chunks, bound, mask, status);
  }
  select_rest(scores + done, groups - done / M, n, M, mask + done, status, stream);
}

}  // namespace

void nm_mask(const void* scores, DType dtype, int64_t groups, int n, int m, uint8_t* mask, int* status, cudaStream_t stream) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* values = static_cast<const T*>(scores);
    switch (m) {
      case 2: return select_fast<2>(values, groups, n, mask, status, stream);
      case 4: return select_fast<4>(values, groups, n, mask, status, stream);
      case 8: return select_fast<8>(values, groups, n, mask, status, stream);
      case 16: return select_fast<16>(values, groups, n, mask, status, stream);
      default: return select_rest(values, groups, n, m, mask, status, stream);
    }
  });
}

}  // namespace sparsekern::cuda
