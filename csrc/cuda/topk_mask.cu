// topk_mask: keeps exactly k, by radix selection (cuda/select.cuh).
//
// Floor: one read of the scores and one byte written for each.
//
// Rows: a block holds a row in registers, up to 32768 float32 or 65536 16-bit scores, so that only the floor is moved. Each step of
// the selection costs a shared-memory atomic for every score that agrees in all higher digits: all of them in the first step of 11
// bits, about 12 % of normally distributed scores in the second, almost none in the third. Longer rows are read again for every
// step, from L2.
//
// Matrix: one cooperative launch in which every block owns a contiguous part of the matrix. It is read once per digit and once for
// the mask: 17 bytes per float32 score (digits of 11, 11 and 10 bits) and 7 per 16-bit score (11 and 5). Passes alternate their
// direction, so that each begins with data that the L2 cache still holds. A matrix of its size therefore moves little more than the
// floor through memory.
#include <algorithm>
#include <stdexcept>

#include "common/order_key.h"
#include "cuda/block.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/select.cuh"
#include "cuda/status.h"
#include "cuda/vector.h"

namespace sparsekern::cuda {

namespace {

constexpr int kHeldVectors =
    8;  // vectors of a thread's tile: half of its registers, if an SM holds as many threads as fit with 64 registers each
constexpr int kStreamVectors = 4;  // vectors in flight at once

template <class Bits>
constexpr int kKeyBits = 8 * sizeof(Bits);

// The scores of a tile (cuda/block.h) of a run, as loaded or as ranks.
template <class Bits, int kThreads, int kVectors>
struct Tile {
  static constexpr int kSize = Vector<Bits>::kSize;
  // Constants for a word of one float32 or two 16-bit scores: a 1 in each, their magnitudes, their signs.
  static constexpr uint32_t kOnes = 0xffffffffu / static_cast<Bits>(~Bits{0});
  static constexpr uint32_t kMagnitudes = kOnes * (static_cast<Bits>(~Bits{0}) >> 1);
  static constexpr uint32_t kSigns = ~kMagnitudes;

  Vector<Bits> vectors[kVectors];
  int64_t first;  // first vector of this thread
  int owned;      // vectors of this thread before the end

  __device__ Tile(const Run<Bits>& run, int64_t begin, int64_t end) : first(begin + threadIdx.x) {
    const int64_t left = (end - first + kThreads - 1) / kThreads;
    owned = static_cast<int>(left < 0 ? 0 : left < kVectors ? left : kVectors);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v < owned) vectors[v] = run.read(first + v * kThreads);
    }
  }

  // Returns whether a score is NaN.
  __device__ bool to_ranks(Bits infinity) {
    const uint32_t to_sign = kMagnitudes - kOnes * infinity;  // addend with which a magnitude above infinity reaches the sign bit
    uint32_t reached = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v >= owned) continue;
#pragma unroll
      for (uint32_t& word : vectors[v].words) {
        reached |= (word & kMagnitudes) + to_sign;
        word = ranks_of<Bits>(word);
      }
    }
    return (reached & kSigns) != 0;
  }

  template <class F>
  __device__ void each(const F& f) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v >= owned) continue;
#pragma unroll
      for (int i = 0; i < kSize; ++i) f(uint32_t{vectors[v][i]});
    }
  }

  // Writes the mask of a tile of ranks. `ties` counts the keys equal to the cut in earlier tiles, and is updated if only some ties
  // are kept.
  __device__ void write_mask(
      const Cut& cut, unsigned& ties, const Run<Bits>& run, uint8_t* mask, ScanScratch<kThreads, uint64_t>& scratch) const {
    TileCounts<kVectors> before;
    const bool split = cut.splits_ties();
    const unsigned earlier = ties;
    if (split) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) before.set(v, v < owned ? ties_of(v, cut) : 0);
      ties += scan_tile<kThreads>(before, scratch);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v >= owned) continue;
      const unsigned left = cut.needed > earlier + before[v] ? cut.needed - earlier - before[v] : 0;
      const bool some_ties = split && left != 0 && left < ties_of(v, cut);
      const int64_t place = (first + v * kThreads) * kSize;
      const int count = run.count - place < kSize ? static_cast<int>(run.count - place) : kSize;
      write_vector(vectors[v], cut.limit(left != 0 && !some_ties), mask + place, count, run.aligned);
      if (some_ties) write_ties(vectors[v], cut.key, left, mask + place, count);
    }
  }

 private:
  // Counts by the word: the comparison leaves zeros in and below the sign bit of each equal score.
  __device__ unsigned ties_of(int v, const Cut& cut) const {
    unsigned others = 0;
#pragma unroll
    for (const uint32_t word : vectors[v].words) {
      const uint32_t differs = word ^ cut.key * kOnes;
      others += __popc((((differs & kMagnitudes) + kMagnitudes) | differs) & kSigns);
    }
    return kSize - others;
  }

  // Writes one byte per score: lanes store 4 or 8 of them, so that a warp stores 128 or 256 contiguous bytes.
  __device__ static void write_vector(const Vector<Bits>& ranks, uint32_t limit, uint8_t* mask, int count, bool aligned) {
    if (aligned && count == kSize) {
      uint32_t bytes[kSize / 4] = {};
#pragma unroll
      for (int i = 0; i < kSize; ++i) bytes[i / 4] |= uint32_t{ranks[i] < limit} << 8 * (i % 4);
      if constexpr (kSize == 4) *reinterpret_cast<uint32_t*>(mask) = bytes[0];
      if constexpr (kSize == 8) *reinterpret_cast<uint2*>(mask) = make_uint2(bytes[0], bytes[1]);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (i < count) mask[i] = ranks[i] < limit;
      }
    }
  }

  // Sets the first `left` ties, in the one vector that keeps only some of its ties.
  __device__ static void write_ties(const Vector<Bits>& ranks, uint32_t key, unsigned left, uint8_t* mask, int count) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (ranks[i] == key && left != 0 && i < count) {
        mask[i] = 1;
        --left;
      }
    }
  }
};

// The vectors from `begin` to `end` of a run that is too long to be held, tile by tile.
template <class Bits, int kThreads>
struct Stream {
  static constexpr int64_t kTile = int64_t{kThreads} * kStreamVectors;

  Run<Bits> run;
  int64_t begin, end;

  template <class F>
  __device__ void each_rank(bool backward, const F& f) const {
    const int64_t tiles = (end - begin + kTile - 1) / kTile;
#pragma unroll 1
    for (int64_t tile = 0; tile < tiles; ++tile) {
      Tile<Bits, kThreads, kStreamVectors> part(run, begin + (backward ? tiles - 1 - tile : tile) * kTile, end);
      part.to_ranks(0);
      part.each(f);
    }
  }

  // Returns whether a score is NaN.
  __device__ bool write_mask(const Cut& cut, Bits infinity, uint8_t* mask, ScanScratch<kThreads, uint64_t>& scratch) const {
    unsigned ties = 0;
    bool nan = false;
#pragma unroll 1
    for (int64_t first = begin; first < end; first += kTile) {
      Tile<Bits, kThreads, kStreamVectors> tile(run, first, end);
      nan |= tile.to_ranks(infinity);
      tile.write_mask(cut, ties, run, mask, scratch);
    }
    return nan;
  }
};

// Scores in memory. The padding of a last vector ranks with -infinity, but after all scores, so that it is never kept before one.
template <class Bits>
struct Scores {
  const Bits* data;
  Bits infinity;
  bool aligned;  // whether data and mask are aligned in every run

  Scores from(int64_t first) const { return {data + first, infinity, aligned}; }

  __device__ Run<Bits> run(int64_t first, int64_t count) const {
    return {data + first, count, aligned, static_cast<Bits>(infinity | Bits{1} << (kKeyBits<Bits> - 1))};
  }
};

// One row per block, at most a tile. A single warp counts digits of 8 bits, whose bins it clears and searches in a few
// instructions.
template <class Bits, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    keep_best_of_held_rows(Scores<Bits> scores, int64_t columns, uint32_t k, uint8_t* mask, int* status) {
  constexpr int kDigitBits = kThreads == kWarp ? 8 : 11;
  __shared__ SelectScratch<kThreads, kDigitBits, uint32_t> scratch;
  __shared__ ScanScratch<kThreads, uint64_t> tie_scratch;
  const Run<Bits> run = scores.run(blockIdx.x * columns, columns);
  Tile<Bits, kThreads, kHeldVectors> tile(run, 0, run.vectors());
  if (tile.to_ranks(scores.infinity)) atomicOr(status, int{kNotFinite});
  const auto each_key = [&](const auto& count) { tile.each(count); };
  const Cut cut = select_in_block(kKeyBits<Bits>, k, static_cast<uint32_t>(columns), scratch, each_key);
  unsigned ties = 0;
  tile.write_mask(cut, ties, run, mask + blockIdx.x * columns, tie_scratch);
}

constexpr int kLongRowThreads = 1024;

template <class Bits>
__global__ void __launch_bounds__(kLongRowThreads)
    keep_best_of_long_rows(Scores<Bits> scores, int64_t columns, uint32_t k, uint8_t* mask, int* status) {
  __shared__ SelectScratch<kLongRowThreads, 11, uint32_t> scratch;
  __shared__ ScanScratch<kLongRowThreads, uint64_t> tie_scratch;
  const Run<Bits> run = scores.run(blockIdx.x * columns, columns);
  const Stream<Bits, kLongRowThreads> stream = {run, 0, run.vectors()};
  const auto each_key = [&](const auto& count) { stream.each_rank(false, count); };
  const Cut cut = select_in_block(kKeyBits<Bits>, k, static_cast<uint32_t>(columns), scratch, each_key);
  if (stream.write_mask(cut, scores.infinity, mask + blockIdx.x * columns, tie_scratch)) atomicOr(status, int{kNotFinite});
}

constexpr int kMatrixThreads = 512;
constexpr int kMatrixDigit = 11;

struct MatrixScratch {
  SelectScratch<kMatrixThreads, kMatrixDigit, uint64_t> select;
  ScanScratch<kMatrixThreads, uint64_t> ties;
};

template <class Bits>
__global__ void __launch_bounds__(kMatrixThreads, 2) keep_best_of_matrix(
    Scores<Bits> scores, int64_t count, int64_t k, GridSelection<kMatrixDigit> grid, unsigned* arrivals, uint8_t* mask,
    int* status) {
  MatrixScratch& scratch = *dynamic_shared<MatrixScratch>();
  const Run<Bits> run = scores.run(0, count);
  const int64_t share = (run.vectors() + gridDim.x - 1) / gridDim.x;
  const int64_t begin = min(run.vectors(), share * blockIdx.x);
  const Stream<Bits, kMatrixThreads> stream = {run, begin, min(run.vectors(), begin + share)};
  unsigned barriers = 0;
  bool backward = GridSelection<kMatrixDigit>::steps(kKeyBits<Bits>) % 2 == 1;  // so that the mask is written forward
  const auto each_key = [&](const auto& f) {
    stream.each_rank(backward, f);
    backward = !backward;
  };
  const Cut cut = select_in_grid(kKeyBits<Bits>, k, count, grid, arrivals, barriers, scratch.select, each_key);
  if (stream.write_mask(cut, scores.infinity, mask, scratch.ties)) atomicOr(status, int{kNotFinite});
}

constexpr int64_t kMostBlocks = 0x7fffffff;

template <class Bits>
struct RowCall {
  Scores<Bits> scores;
  int64_t rows, columns, k;
  uint8_t* mask;
  int* status;
  cudaStream_t stream;

  // Returns whether a block of this many threads holds a row.
  template <int kThreads>
  bool held() const {
    if (columns > kThreads * kHeldVectors * Vector<Bits>::kSize) return false;
    run(keep_best_of_held_rows<Bits, kThreads>, kThreads);
    return true;
  }

  template <class Kernel>
  void run(Kernel kernel, int threads) const {
    for (int64_t row = 0; row < rows; row += kMostBlocks) {
      const auto blocks = static_cast<unsigned>(std::min(rows - row, kMostBlocks));
      launch(
          kernel, dim3(blocks), dim3(threads), stream, scores.from(row * columns), columns, static_cast<uint32_t>(k),
          mask + row * columns, status);
    }
  }
};

template <class Bits>
void keep_best_of_rows(const RowCall<Bits>& call) {
  const bool held = call.template held<32>() || call.template held<128>() || call.template held<256>() ||
                    call.template held<512>() || call.template held<1024>();
  if (!held) call.run(keep_best_of_long_rows<Bits>, kLongRowThreads);
}

// The grid of the matrix kernel and the memory that its blocks share.
struct MatrixPlan {
  unsigned blocks;
  int64_t barrier_bytes, total_bytes, own_bytes;

  int64_t cleared_bytes() const { return barrier_bytes + total_bytes; }
  int64_t bytes() const { return cleared_bytes() + own_bytes; }
};

template <class Bits>
MatrixPlan plan_matrix(int64_t count) {
  using Selection = GridSelection<kMatrixDigit>;
  constexpr int64_t kTile = Stream<Bits, kMatrixThreads>::kTile * Vector<Bits>::kSize;
  const int64_t resident = resident_blocks(keep_best_of_matrix<Bits>, kMatrixThreads, sizeof(MatrixScratch));
  const int64_t blocks = std::min(resident, (count + kTile - 1) / kTile);
  constexpr int64_t kTotals = int64_t{Selection::steps(kKeyBits<Bits>)} << kMatrixDigit;
  constexpr int64_t kOwn = int64_t{1} << Selection::last_bits(kKeyBits<Bits>);
  return {
      static_cast<unsigned>(blocks), sizeof(unsigned long long), kTotals * int64_t{sizeof(unsigned long long)},
      blocks * kOwn * int64_t{sizeof(uint32_t)}};
}

template <class Bits>
void keep_best_of_all(
    const Scores<Bits>& scores, int64_t count, int64_t k, void* workspace, uint8_t* mask, int* status, cudaStream_t stream) {
  const MatrixPlan plan = plan_matrix<Bits>(count);
  auto* memory = static_cast<unsigned char*>(workspace);
  check_cuda(cudaMemsetAsync(memory, 0, static_cast<size_t>(plan.cleared_bytes()), stream), "memset");
  const GridSelection<kMatrixDigit> grid = {
      reinterpret_cast<unsigned long long*>(memory + plan.barrier_bytes),
      reinterpret_cast<uint32_t*>(memory + plan.cleared_bytes())};
  launch_cooperative(
      keep_best_of_matrix<Bits>, dim3(plan.blocks), dim3(kMatrixThreads), sizeof(MatrixScratch), stream, scores, count, k, grid,
      reinterpret_cast<unsigned*>(memory), mask, status);
}

// Size up to which one block selects faster than a grid of blocks synchronises.
constexpr int64_t kSmallMatrix = 16384;
// Longer rows would overflow the 32-bit counts of a block.
constexpr int64_t kLongestRow = 0xffffffff;

bool by_grid(int64_t rows, int64_t columns, bool whole_matrix) {
  if (rows * columns <= kSmallMatrix) return false;
  return whole_matrix || rows == 1 || columns > kLongestRow;
}

template <class Bits>
void topk_mask_of(
    const Bits* data, Bits infinity, int64_t rows, int64_t columns, int64_t k, bool whole_matrix, uint8_t* mask, void* workspace,
    int* status, cudaStream_t stream) {
  const bool grid = by_grid(rows, columns, whole_matrix);
  if (whole_matrix) {
    columns *= rows;
    rows = 1;
  }
  const bool aligned = is_aligned(data, 16) && is_aligned(mask, 8) && (rows == 1 || columns % Vector<Bits>::kSize == 0);
  if (!grid) {
    keep_best_of_rows<Bits>({{data, infinity, aligned}, rows, columns, k, mask, status, stream});
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = row * columns;
    keep_best_of_all<Bits>({data + first, infinity, aligned}, columns, k, workspace, mask + first, status, stream);
  }
}

}  // namespace

int64_t topk_mask_workspace(DType dtype, int64_t rows, int64_t columns, bool whole_matrix) {
  if (!by_grid(rows, columns, whole_matrix)) return 0;
  const int64_t count = whole_matrix ? rows * columns : columns;
  return size_of(dtype) == 4 ? plan_matrix<uint32_t>(count).bytes() : plan_matrix<uint16_t>(count).bytes();
}

void topk_mask(
    const void* scores, DType dtype, int64_t rows, int64_t columns, int64_t k, bool whole_matrix, uint8_t* mask, void* workspace,
    int* status, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return;
  if (dtype == DType::f32) {
    topk_mask_of<uint32_t>(
        static_cast<const uint32_t*>(scores), infinity_bits(float{}), rows, columns, k, whole_matrix, mask, workspace, status,
        stream);
  } else {
    const int32_t infinity = dtype == DType::bf16 ? infinity_bits(BFloat16{}) : infinity_bits(Half{});
    topk_mask_of<uint16_t>(
        static_cast<const uint16_t*>(scores), static_cast<uint16_t>(infinity), rows, columns, k, whole_matrix, mask, workspace,
        status, stream);
  }
}

}  // namespace sparsekern::cuda
