// obs_sweep: one launch for all work inside a block of at most 128 columns. cuBLAS computes the products between blocks, one before
// each (sparsekern/backends/obs_sweep.py).
//
// Floor for 4096 x 4096 on an H200: rows * columns^2 = 69 GFLOP in the products, 1.4 ms at 50 TFLOP/s of plain float32. The 32
// blocks of columns add 2 GFLOP and 0.3 GB, under 0.1 ms. Latency therefore decides: that of 64 launches and of 4096 columns one
// after the other. Estimate for one block, from the instructions (obs_recurrence.cuh) at 1.75 GHz, not measured:
//   launch 2 us; the triangle (33 KB of V per thread block, from L2) and the rows 2 us; results 1 us;
//   the recurrence on 128 thread blocks of 32 rows, two warps per scheduler: 4480 issue slots or a chain of 2700 cycles, 2.6 us;
//   for 2:4 6980 slots, 4 us;
//   if all rows compete, the recurrence twice, and between them three digits of the scores, each with a barrier of the grid: 3 us.
// The sum is 8 us, 9 us for 2:4, and 20 us with all rows competing. Times 32 and with the products that is 1.7 ms for the first
// two and 2.1 ms for the last.
//
// Each row has eight lanes rather than one. It is read and written as stored, without transposition. All its columns are in
// registers, so that only the triangle is read twice. 4096 rows give enough warps. V itself multiplies, so that no inverse is
// needed: the scores of a block are the result of the same recurrence with everything kept.
#include <algorithm>
#include <cfloat>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/obs_choice.cuh"
#include "cuda/status.h"

namespace sparsekern::cuda {

namespace {

constexpr int kMostWarps = 8, kMostThreads = kWarp * kMostWarps;
constexpr int kMostTiles = 8;
constexpr int kCheckThreads = 256, kCheckBlocks = 1024;

// Calls f with the element type of the weights. The type is uniform over the grid: one branch around all loads and one around all
// stores cost little, compared with three copies of the kernel.
template <class F>
__device__ __forceinline__ void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(BFloat16{});
    case DType::f16: return f(Half{});
  }
}

// A lane's row: its index, and its number of columns in the block (none past the last row). Consecutive warps have consecutive
// rows.
struct Row {
  int64_t index;
  int width;

  __device__ Row(const ObsBlock& block, int64_t warp)
      : index(warp * kRowsPerWarp + row_of_lane()), width(index < block.rows ? block.width : 0) {}
  __device__ int64_t offset(const ObsBlock& block) const { return index * block.columns + block.begin; }
  __device__ float* delta(const ObsBlock& block) const { return block.delta + index * block.delta_stride; }
};

template <int kWidth>
__device__ __forceinline__ void load_weight(const ObsBlock& block, const Row& row, RawColumns<kWidth>& weight) {
  with_type(block.dtype, [&](auto type) {
    weight.load(static_cast<const decltype(type)*>(block.weight) + row.offset(block), row.width);
  });
}

// Loads the columns at the start of the block: sums in the units of the weights, zeros for dead features.
template <int kWidth>
__device__ __forceinline__ void prepare_columns(
    const ObsBlock& block, const Triangle<kWidth>& triangle, const RawColumns<kWidth>& weight, const RawColumns<kWidth>& pending,
    Columns<kWidth>& columns) {
  using L = Layout<kWidth>;
  with_type(block.dtype, [&](auto type) { weight.template unpack<decltype(type)>(columns.start); });
  pending.template unpack<float>(columns.taken);
  bool finite = true;
#pragma unroll
  for (int c = 0; c < L::kChunks; ++c) {
    float reciprocal[kWidth];
    load_shared(triangle.reciprocal + L::column(c), reciprocal);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      finite &= fabsf(columns.start[c][i]) <= FLT_MAX;
      columns.taken[c][i] *= reciprocal[i];
      if (reciprocal[i] == 0.0f) columns.start[c][i] = 0.0f;
    }
  }
  if (!finite) atomicOr(block.status, static_cast<int>(kNotFinite));
}

template <int kWidth>
__device__ __forceinline__ void load_columns(
    const ObsBlock& block, const Triangle<kWidth>& triangle, const Row& row, Columns<kWidth>& columns) {
  RawColumns<kWidth> weight, pending;
  load_weight(block, row, weight);
  pending.load(row.delta(block), row.width);
  prepare_columns(block, triangle, weight, pending, columns);
}

template <class T, bool kStoreMask, int kWidth>
__device__ __forceinline__ void store_columns_as(
    const ObsBlock& block, const Triangle<kWidth>& triangle, const Row& row, const Columns<kWidth>& columns) {
  float error = 0.0f;
#pragma unroll
  for (int p = 0; p < Parts<kWidth>::kCount; ++p) {
    const int c = Parts<kWidth>::chunk(p), first = Parts<kWidth>::first(p), column = Parts<kWidth>::column(p);
    float diagonal[4], delta[4], left[4];
    load_shared(triangle.diagonal + column, diagonal);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool kept = columns.kept(c, first + i);
      const float now = columns.now(c, first + i), cost = kept ? 0.0f : now * diagonal[i];
      delta[i] = kept ? columns.taken[c][first + i] : columns.start[c][first + i];
      left[i] = kept ? now : 0.0f;
      error = fmaf(cost, cost, error);
    }
    if (column >= row.width) continue;
    store_four(row.delta(block) + column, delta);
    store_four(static_cast<T*>(block.new_weight) + row.offset(block) + column, left);
    if constexpr (kStoreMask) store_four_bits(block.mask + row.offset(block) + column, columns.keep >> (4 * p));
  }
  error = sum_of_row(error);
  if (place_of_lane() == 0 && row.width != 0) block.row_error[row.index] += error;
}

template <bool kStoreMask, int kWidth>
__device__ __forceinline__ void store_columns(
    const ObsBlock& block, const Triangle<kWidth>& triangle, const Row& row, const Columns<kWidth>& columns) {
  with_type(block.dtype, [&](auto type) { store_columns_as<decltype(type), kStoreMask>(block, triangle, row, columns); });
}

// Stores the scores of a block that was swept with everything kept.
template <int kWidth>
__device__ __forceinline__ void store_scores(
    const ObsBlock& block, const Triangle<kWidth>& triangle, const Row& row, const Columns<kWidth>& columns) {
#pragma unroll
  for (int p = 0; p < Parts<kWidth>::kCount; ++p) {
    const int c = Parts<kWidth>::chunk(p), first = Parts<kWidth>::first(p), column = Parts<kWidth>::column(p);
    float diagonal[4], delta[4], score[4];
    load_shared(triangle.diagonal + column, diagonal);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      delta[i] = columns.taken[c][first + i];
      score[i] = columns.score(c, first + i, diagonal[i]);
    }
    if (column >= row.width) continue;
    store_four(row.delta(block) + column, delta);
    store_four(block.scores + row.index * block.delta_stride + column, score);
  }
}

enum class Kernel { given, group, any_group, row, scores };

template <Kernel kKernel, class P>
__global__ void __launch_bounds__(kMostThreads, 2) sweep_block(const ObsBlock block) {
  constexpr int kWidth = P::kWidth;
  const Triangle<kWidth> triangle(dynamic_shared<float>());
  const Row row(block, int64_t{blockIdx.x} * block.warps + warp_index());
  const int kept = static_cast<int>(block.kept);
  Columns<kWidth> columns;
  columns.keep = kKernel == Kernel::given ? load_bits<kWidth>(block.mask + row.offset(block), row.width) : ~0u;
  {
    // The weights come from device memory and are requested first; the sums were just written by the product.
    RawColumns<kWidth> weight, pending;
    load_weight(block, row, weight);
    load_triangle(block, triangle);
    pending.load(row.delta(block), row.width);
    __syncthreads();
    prepare_columns(block, triangle, weight, pending, columns);
  }
  if constexpr (kKernel == Kernel::any_group) {
    float* const scratch = dynamic_shared<float>() + Triangle<kWidth>::kFloats + warp_index() * AnyGroups::kFloats;
    AnyGroups(scratch).run(triangle, block.width, kept, block.group, columns);
  } else {
    if constexpr (kKernel == Kernel::row) {
      run_recurrence<NoPattern>(triangle, block.width, 0, columns);
      columns.keep = largest_of_row(Keys<kWidth>(triangle, columns, row.width), kept);
      load_columns(block, triangle, row, columns);  // loaded again: holding them costs more in registers than loading costs in time
    }
    run_recurrence<P>(triangle, block.width, kept, columns);
  }
  if constexpr (kKernel == Kernel::scores) {
    store_scores(block, triangle, row, columns);
  } else {
    store_columns<kKernel != Kernel::given>(block, triangle, row, columns);
  }
}

// Device memory shared by the thread blocks of a cooperative launch.
struct Workspace {
  static constexpr int kTotals = 2 * (ScoreSelection::steps(kScoreBits) << kScoreDigit), kArrivals = 4;  // words per call
  static constexpr int kOwn = 1 << ScoreSelection::last_bits(kScoreBits);                                // words per thread block

  ScoreSelection selection;
  unsigned* arrivals;

  __device__ explicit Workspace(const ObsBlock& block)
      : selection{reinterpret_cast<unsigned long long*>(block.cleared), block.shared}, arrivals(block.cleared + kTotals) {}
};

// All rows compete. A thread block goes through its rows twice, in tiles of 32. First it scores them and keeps the scores in shared
// memory. Once the grid has agreed on the threshold, it prunes them.
struct Competition {
  static constexpr size_t kFixedBytes = sizeof(float) * Triangle<4>::kFloats + sizeof(ScoreScratch<kMostThreads>);
  static constexpr size_t kTileBytes = sizeof(int) * Keys<4>::kCount * kMostThreads;

  Triangle<4> triangle;
  ScoreScratch<kMostThreads>& scratch;
  int* keys;  // [tiles][Keys<4>::kCount][kMostThreads]

  __device__ explicit Competition(float* shared)
      : triangle(shared),
        scratch(*reinterpret_cast<ScoreScratch<kMostThreads>*>(shared + Triangle<4>::kFloats)),
        keys(reinterpret_cast<int*>(&scratch + 1)) {}

  // This thread's keys of a tile.
  __device__ int* tile(int index) const { return keys + index * Keys<4>::kCount * kMostThreads + threadIdx.x; }

  __device__ Cut select(const ObsBlock& block) const {
    const Workspace workspace(block);
    unsigned barriers = 0;
    return select_in_grid<kMostThreads>(
        kScoreBits, static_cast<uint64_t>(block.kept), static_cast<uint64_t>(block.rows) * block.width, workspace.selection,
        workspace.arrivals, barriers, scratch, [&](const auto& count) {
#pragma unroll 1
          for (int index = 0; index < block.tiles; ++index) {
            Keys<4>(tile(index), kMostThreads).each([&](int key) {
              if (key >= 0) count(rank_of(static_cast<uint32_t>(key)));
            });
          }
        });
  }
};

__global__ void __launch_bounds__(kMostThreads, 2) sweep_competing_rows(const ObsBlock block) {
  const Competition competition(dynamic_shared<float>());
  const Triangle<4>& triangle = competition.triangle;
  load_triangle(block, triangle);
  __syncthreads();
  Ties ties;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const bool scoring = pass == 0;
    if (!scoring) ties = Ties(competition.select(block));
#pragma unroll 1
    for (int tile = 0; tile < block.tiles; ++tile) {
      Columns<4> columns;
      columns.keep = ~0u;
      if (!scoring) {
        const Keys<4> keys(competition.tile(tile), kMostThreads);
        columns.keep = above(keys, ties.threshold, ties.of_row(keys, competition.scratch.scan));
      }
      const Row row(block, (int64_t{blockIdx.x} * block.tiles + tile) * kMostWarps + warp_index());
      load_columns(block, triangle, row, columns);
      run_recurrence<NoPattern>(triangle, block.width, 0, columns);
      if (scoring) {
        Keys<4>(triangle, columns, row.width).store(competition.tile(tile), kMostThreads);
      } else {
        store_columns<true>(block, triangle, row, columns);
      }
    }
  }
}

// Checks `fours` float4, reading each once.
__global__ void __launch_bounds__(kCheckThreads) check_finite(const float4* values, int64_t fours, int* status) {
  bool finite = true;
  const int64_t stride = int64_t{gridDim.x} * kCheckThreads;
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * kCheckThreads + threadIdx.x; i < fours; i += stride) {
    const float4 four = __ldg(values + i);
    finite &= fabsf(four.x) <= FLT_MAX;
    finite &= fabsf(four.y) <= FLT_MAX;
    finite &= fabsf(four.z) <= FLT_MAX;
    finite &= fabsf(four.w) <= FLT_MAX;
  }
  if (!finite) atomicOr(status, static_cast<int>(kNotFinite));
}

int64_t blocks_for(int64_t rows, int warps) { return (rows + warps * kRowsPerWarp - 1) / (warps * kRowsPerWarp); }

template <Kernel kKernel, class P = NoPattern>
void launch_block(const ObsBlock& block, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(blocks_for(block.rows, block.warps)));
  const int floats = Triangle<P::kWidth>::kFloats + (kKernel == Kernel::any_group ? AnyGroups::kFloats * block.warps : 0);
  launch_shared(sweep_block<kKernel, P>, grid, dim3(kWarp * block.warps), sizeof(float) * floats, stream, block);
}

void launch_groups(const ObsBlock& block, cudaStream_t stream) {
  if (block.group == 2) return launch_block<Kernel::group, Pattern<2, 1>>(block, stream);
  if (block.group == 4 && block.kept == 1) return launch_block<Kernel::group, Pattern<4, 1>>(block, stream);
  if (block.group == 4 && block.kept == 2) return launch_block<Kernel::group, Pattern<4, 2>>(block, stream);
  if (block.group == 4 && block.kept == 3) return launch_block<Kernel::group, Pattern<4, 3>>(block, stream);
  if (block.group == 8) return launch_block<Kernel::group, Pattern<8>>(block, stream);
  launch_block<Kernel::any_group>(block, stream);
}

void launch_competing_rows(const ObsBlock& block, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(blocks_for(block.rows, kMostWarps * block.tiles)));
  const size_t shared = Competition::kFixedBytes + Competition::kTileBytes * block.tiles;
  launch_cooperative(sweep_competing_rows, grid, dim3(kMostThreads), shared, stream, block);
}

}  // namespace

void obs_sweep_block(const ObsBlock& block, cudaStream_t stream) {
  if (block.rows == 0 || block.width == 0) return;
  switch (block.choice) {
    case ObsChoice::given: return launch_block<Kernel::given>(block, stream);
    case ObsChoice::group: return launch_groups(block, stream);
    case ObsChoice::row: return launch_block<Kernel::row>(block, stream);
    case ObsChoice::block: return launch_competing_rows(block, stream);
  }
}

void obs_sweep_scores(const ObsBlock& block, cudaStream_t stream) {
  if (block.rows == 0 || block.width == 0) return;
  launch_block<Kernel::scores>(block, stream);
}

int obs_sweep_tiles(int64_t rows) {
  const int most = static_cast<int>((most_shared_bytes() - Competition::kFixedBytes) / Competition::kTileBytes);
  for (int tiles = 1; tiles <= std::min(most, kMostTiles); ++tiles) {
    const size_t shared = Competition::kFixedBytes + Competition::kTileBytes * tiles;
    if (blocks_for(rows, kMostWarps * tiles) <= resident_blocks(sweep_competing_rows, kMostThreads, shared)) return tiles;
  }
  return 0;
}

int64_t obs_sweep_cleared_words() { return Workspace::kTotals + Workspace::kArrivals; }

int64_t obs_sweep_shared_words(int64_t rows) { return Workspace::kOwn * blocks_for(rows, kMostWarps); }

void obs_sweep_check_factor(const float* factor, int64_t count, int* status, cudaStream_t stream) {
  if (count == 0) return;
  const int64_t fours = count / 4, blocks = std::min<int64_t>((fours + kCheckThreads - 1) / kCheckThreads, kCheckBlocks);
  const auto* values = reinterpret_cast<const float4*>(factor);
  launch(check_finite, dim3(static_cast<unsigned>(blocks)), dim3(kCheckThreads), stream, values, fours, status);
}

}  // namespace sparsekern::cuda
