// nm_q4_pack: rounds an N:M weight to 4-bit multiples of its scales, in blocks of common/nm_q4.h.
//
// Floor: one read of the weight and the scales, and one write of the blocks. A strip is written by one thread. Packing is a step of saving
// a model, which takes longer to write, so that weights are rounded and placed one by one.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/finite.h"
#include "cpu/kernels.h"
#include "cpu/nm_q4_activations.h"

namespace sparsekern::cpu {

namespace {

using nm_q4::kColumns;
using nm_q4::Layout;

int64_t code_of(float weight, float scale) {
  if (scale == 0.0f) return 0;
  return static_cast<int64_t>(nearest_whole(std::clamp(weight / scale, -8.0f, 7.0f)));
}

template <class T>
struct Source {
  const T* weight;
  const Half* scales;
  int64_t rows, columns;

  float at(int64_t row, int64_t column) const { return to_float(weight[row * columns + column]); }
  float scale(int64_t row, int64_t block) const { return to_float(scales[row * nm_q4::blocks(columns) + block]); }
  int64_t code(int64_t row, int64_t column) const { return code_of(at(row, column), scale(row, column / kColumns)); }
};

void put(uint8_t* block, Layout::Place place, int64_t bits) { block[place.byte] |= static_cast<uint8_t>(bits << place.shift); }

// Stores the values of a group, of which values k to k + n - 1 of a quarter are. Returns whether it fits.
bool pack_group(const int64_t* codes, const Layout& layout, int64_t row, int64_t quarter, int64_t k, uint8_t* block) {
  const int64_t non_zeros = layout.m - std::count(codes, codes + layout.m, 0);
  int64_t spare = layout.n - non_zeros;  // the first zeros fill the group
  for (int64_t position = 0, stored = 0; position < layout.m && stored < layout.n; ++position) {
    if (codes[position] == 0 && spare-- <= 0) continue;
    put(block, layout.position(row, quarter, k + stored), position);
    put(block, layout.value(row, quarter, k + stored), codes[position] + nm_q4::kZero);
    ++stored;
  }
  return non_zeros <= layout.n;
}

// Packs 64 columns of a strip; what is past the weight is zero. Returns whether every group fits.
template <class T>
bool pack_block(const Source<T>& source, const Layout& layout, int64_t first_row, int64_t index, uint8_t* block) {
  std::fill_n(block, layout.bytes(), uint8_t{0});
  bool sound = true;
  for (int64_t own = 0; own < layout.rows(); ++own) {
    const int64_t row = first_row + own;
    const bool given = row < source.rows;
    const float scale = given ? source.scale(row, index) : 0.0f;
    if (given)
      std::copy_n(
          source.scales + row * nm_q4::blocks(source.columns) + index, 1,
          reinterpret_cast<Half*>(block + layout.scales_at()) + own);
    for (int64_t quarter = 0; quarter < nm_q4::kQuarters; ++quarter) {
      for (int64_t k = 0; k < layout.kept(); k += layout.n) {
        int64_t codes[nm_q4::kQuarterColumns] = {};
        const int64_t column = index * kColumns + layout.group_column(quarter, k);
        for (int64_t i = 0; given && column < source.columns && i < layout.m; ++i) {
          codes[i] = code_of(source.at(row, column + i), scale);
        }
        sound &= pack_group(codes, layout, own, quarter, k, block);
      }
    }
  }
  return sound;
}

// Throws for the first group that does not fit.
template <class T>
[[noreturn]] void refuse(const Source<T>& source, const Layout& layout) {
  for (int64_t i = 0; i < source.rows * source.columns; i += layout.m) {
    int64_t count = 0;
    const int64_t row = i / source.columns, column = i % source.columns;
    for (int64_t j = 0; j < layout.m; ++j) count += source.code(row, column + j) != 0;
    if (count <= layout.n) continue;
    throw std::invalid_argument(
        "weight: expected at most " + std::to_string(layout.n) + " non-zeros in every " + std::to_string(layout.m) +
        " inputs, got " + std::to_string(count) + " in row " + std::to_string(row) + ", columns " + std::to_string(column) +
        " to " + std::to_string(column + layout.m - 1));
  }
  throw std::logic_error("nm_q4_pack: refused a weight without a fault");
}

}  // namespace

void nm_q4_pack(
    const void* weight, DType dtype, const void* scales, int64_t rows, int64_t columns, const Layout& layout, uint8_t* blocks,
    const Executor& executor) {
  require_finite("weight", weight, dtype, rows, columns, nullptr, executor);
  require_finite("scales", scales, DType::f16, rows, nm_q4::blocks(columns), nullptr, executor);
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Source<T> source{static_cast<const T*>(weight), static_cast<const Half*>(scales), rows, columns};
    const int64_t across = nm_q4::blocks(columns);
    std::atomic<bool> sound{true};
    parallel_for(executor, layout.strips(rows), 1 + 2048 / (columns + 1), [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip) {
        for (int64_t b = 0; b < across; ++b) {
          if (!pack_block(source, layout, strip * layout.rows(), b, blocks + (strip * across + b) * layout.bytes())) sound = false;
        }
      }
    });
    if (!sound) refuse(source, layout);
  });
}

}  // namespace sparsekern::cpu
