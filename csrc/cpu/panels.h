// Panels: the layout shared by `gram_`, `reverse_cholesky` and `obs_sweep`, and the register-tiled product on it.
//
// A panel holds 16 neighbouring rows (or features) for a run of k: element (k, lane) is stored at panel[16 * k + lane]. An element
// is a unit: one float, or a pair of bf16 for two consecutive k. A tile product multiplies a few lanes of one panel (broadcast) by
// all lanes of up to three panels (vectors). Both operands of every product in these ops are panels, so that nothing is packed
// twice.
//
// Vectors are GCC vector extensions: each target function inlines the same source and compiles it to its own instructions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/isa.h"

namespace sparsekern::cpu {

constexpr int64_t kLanes = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], FreeDeleter>;

// Uninitialised memory aligned to a cache line, which is also a vector boundary.
template <class T>
Buffer<T> allocate(int64_t count) {
  const auto bytes = static_cast<size_t>(round_up(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T)), 64));
  auto* p = static_cast<T*>(std::aligned_alloc(64, bytes));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer<T>(p);
}

// Vector types of one register of each target. Written out, because GCC drops a vector_size that depends on a template parameter.
// Unaligned and aliasing, so that they can be loaded from and stored to plain float arrays.
template <int kWidth>
struct VectorOf;
template <>
struct VectorOf<4> {
  using Float = float __attribute__((vector_size(16), aligned(4), may_alias));
  using Int = int32_t __attribute__((vector_size(16), aligned(4), may_alias));
  using Byte = int8_t __attribute__((vector_size(4), aligned(1), may_alias));
};
template <>
struct VectorOf<8> {
  using Float = float __attribute__((vector_size(32), aligned(4), may_alias));
  using Int = int32_t __attribute__((vector_size(32), aligned(4), may_alias));
  using Byte = int8_t __attribute__((vector_size(8), aligned(1), may_alias));
};
template <>
struct VectorOf<16> {
  using Float = float __attribute__((vector_size(64), aligned(4), may_alias));
  using Int = int32_t __attribute__((vector_size(64), aligned(4), may_alias));
  using Byte = int8_t __attribute__((vector_size(16), aligned(1), may_alias));
};

// The targets of the tile product: register width, and the tile that fits the registers.
struct Baseline {
  static constexpr int kWidth = 4, kTileRows = 2, kTilePanels = 1;
};
struct Avx2 {
  static constexpr int kWidth = 8, kTileRows = 4, kTilePanels = 1;
};
struct Avx512 {
  static constexpr int kWidth = 16, kTileRows = 8, kTilePanels = 3;
};

// One float per unit.
template <class Target>
struct FloatArithmetic {
  using Unit = float;
  using Vector = typename VectorOf<Target::kWidth>::Float;
  static SPARSEKERN_INLINE void multiply_add(Vector& acc, const Unit& broadcast, const Vector& vector) {
    acc += broadcast * vector;
  }
};

// The output of a tile product: broadcast lane i of vector panel v is added to data[i * row_stride + v * panel_stride + lane].
struct TileOutput {
  float* data;
  int64_t row_stride;
  int64_t panel_stride;
};

// Units to prefetch ahead: enough for the second-level cache, and nearly enough for the last level.
constexpr int64_t kPrefetchUnits = 16;

// Units summed in registers before they are added to the tile's total: short runs keep the rounding error of long sums small.
constexpr int64_t kRunUnits = 128;

// output[i][v] += alpha * sum_k broadcast[k][i] * vectors[v][k], for kRows broadcast lanes and kPanels vector panels.
template <class Target, class Arithmetic, int kRows, int kPanels>
SPARSEKERN_INLINE void tile_product(
    int64_t units, const typename Arithmetic::Unit* broadcast, const typename Arithmetic::Unit* vectors,
    int64_t vector_panel_stride, float alpha, const TileOutput& output) {
  using Vector = typename Arithmetic::Vector;
  constexpr int kParts = kLanes / Target::kWidth;  // registers per panel row
  constexpr int kColumns = kPanels * kParts;
  // The output is used only at the end, when these lines have arrived from memory.
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kPanels; ++v) __builtin_prefetch(output.data + i * output.row_stride + v * output.panel_stride, 1);
  }
  Vector total[kRows][kColumns] = {};
  for (int64_t begin = 0; begin < units; begin += kRunUnits) {
    const int64_t end = std::min(begin + kRunUnits, units);
    Vector acc[kRows][kColumns] = {};
#pragma GCC unroll 4
    for (int64_t k = begin; k < end; ++k) {
      Vector vector[kColumns];
#pragma GCC unroll 3
      for (int v = 0; v < kPanels; ++v) {
        const auto* p = vectors + v * vector_panel_stride + k * kLanes;
        __builtin_prefetch(p + kPrefetchUnits * kLanes);
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          vector[v * kParts + part] = *reinterpret_cast<const Vector*>(p + part * Target::kWidth);
        }
      }
      const auto* b = broadcast + k * kLanes;
      __builtin_prefetch(b + kPrefetchUnits * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 12
        for (int c = 0; c < kColumns; ++c) Arithmetic::multiply_add(acc[i][c], b[i], vector[c]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int c = 0; c < kColumns; ++c) total[i][c] += acc[i][c];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int c = 0; c < kColumns; ++c) {
      float* p = output.data + i * output.row_stride + c / kParts * output.panel_stride + c % kParts * Target::kWidth;
      auto* q = reinterpret_cast<typename VectorOf<Target::kWidth>::Float*>(p);
      *q = *q + alpha * total[i][c];
    }
  }
}

// The same for any multiple of the tile's broadcast lanes, and up to three vector panels.
template <class Target, class Arithmetic>
SPARSEKERN_INLINE void panel_product(
    int64_t units, const typename Arithmetic::Unit* broadcast, int64_t rows, const typename Arithmetic::Unit* vectors,
    int64_t panels, int64_t vector_panel_stride, float alpha, const TileOutput& output) {
  constexpr int kRows = Target::kTileRows;
  for (int64_t i = 0; i < rows; i += kRows) {
    const auto* b = broadcast + i;
    TileOutput tile{output.data + i * output.row_stride, output.row_stride, output.panel_stride};
    int64_t v = 0;
    for (; v + Target::kTilePanels <= panels; v += Target::kTilePanels) {
      tile_product<Target, Arithmetic, kRows, Target::kTilePanels>(
          units, b, vectors + v * vector_panel_stride, vector_panel_stride, alpha, tile);
      tile.data += Target::kTilePanels * output.panel_stride;
    }
    for (; v < panels; ++v) {
      tile_product<Target, Arithmetic, kRows, 1>(units, b, vectors + v * vector_panel_stride, vector_panel_stride, alpha, tile);
      tile.data += output.panel_stride;
    }
  }
}

// A column of kPanels panels, in registers.
template <class Target, int kPanels>
struct Column {
  using Float = typename VectorOf<Target::kWidth>::Float;
  static constexpr int kParts = kLanes / Target::kWidth;
  static constexpr int kRegisters = kPanels * kParts;
  Float part[kRegisters];

  // Offset of register `r` of a column, for panels that are `stride` floats apart.
  static constexpr int64_t offset(int r, int64_t stride) { return r / kParts * stride + r % kParts * Target::kWidth; }

  static SPARSEKERN_INLINE Column load(const float* column, int64_t stride) {
    Column c;
#pragma GCC unroll 12
    for (int r = 0; r < kRegisters; ++r) c.part[r] = *reinterpret_cast<const Float*>(column + offset(r, stride));
    return c;
  }
  SPARSEKERN_INLINE void store(float* column, int64_t stride) const {
#pragma GCC unroll 12
    for (int r = 0; r < kRegisters; ++r) *reinterpret_cast<Float*>(column + offset(r, stride)) = part[r];
  }
};

// sums[j] += sum_i columns[i] * coefficients[j * coefficient_stride + i] for kColumns outputs j; the columns of a panel are
// consecutive. This is the core of a triangular recurrence within a block, where the output of one step is an input of the next.
template <class Target, int kPanels, int kColumns>
SPARSEKERN_INLINE void add_combination(
    int64_t count, const float* columns, int64_t panel_stride, const float* coefficients, int64_t coefficient_stride,
    Column<Target, kPanels> (&sums)[kColumns]) {
  using Columns = Column<Target, kPanels>;
  for (int64_t i = 0; i < count; ++i) {
    const Columns column = Columns::load(columns + i * kLanes, panel_stride);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      const float coefficient = coefficients[j * coefficient_stride + i];
#pragma GCC unroll 12
      for (int r = 0; r < Columns::kRegisters; ++r) sums[j].part[r] += coefficient * column.part[r];
    }
  }
}

}  // namespace sparsekern::cpu
