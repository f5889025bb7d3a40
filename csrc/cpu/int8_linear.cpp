// int8_linear: x W^T + b from a weight of 8-bit values with a scale for each row, and from x as it is.
//
// Floor for one token: the bytes of the weight, half of the time to read 16-bit weights. 32 weights take 12 instructions: for each
// 8, a load that extends them, a conversion, and a multiply-add that loads x. A Zen 3 at 3.2 GHz converts 8 G weights per second this way, and
// a core's share of the memory delivers less. Two rows far apart are read together, since two streams give a core more of the memory
// than one. Rounding x to 8 bits, as nm_q4_linear does, would save instructions that nothing waits for.
//
// Up to 4 tokens share the conversion. Many tokens are a dense product with the expanded weight (packed_linear.h).
#include <algorithm>
#include <type_traits>

#include "cpu/int8_multiply.h"
#include "cpu/kernels.h"
#include "cpu/packed_linear.h"

namespace sparsekern::cpu {

namespace {

using int8_multiply::kMostTokens;

// The weight in tiles of 16 rows, as packed_linear.h multiplies by it.
struct Int8Weight {
  int64_t rows, columns;
  Int8Rows packed;
  ByStreams<int8_multiply::MultiplyRows> multiply_by[3];  // 1, 2 and 4 tokens

  Int8Weight(const Int8Rows& p, int64_t columns_, Isa isa)
      : rows(p.rows),
        columns(columns_),
        packed(p),
        multiply_by{
            int8_multiply::multiply_by_streams<1>(isa), int8_multiply::multiply_by_streams<2>(isa),
            int8_multiply::multiply_by_streams<4>(isa)} {}

  int64_t bytes() const { return rows * columns; }
  int64_t first_tile(int64_t task, int64_t tasks) const { return packed_rows::tiles(rows) * task / tasks; }

  bool multiply(const int64_t* tiles, int64_t given, const TokenBlock& block, TileSums* sums) const {
    for (int64_t row = 0; row < packed_rows::kTileRows; ++row) {
      int8_multiply::Rows some_rows{{}, columns, nullptr, block.x_stride};
      float scales[kStreams] = {};
      int64_t some = 0;
      for (; some < given && tiles[some] * packed_rows::kTileRows + row < rows; ++some) {  // only the last tile may be short
        const int64_t i = tiles[some] * packed_rows::kTileRows + row;
        some_rows.row[some] = packed.values + i * columns;
        scales[some] = packed.scales[i];
      }
      if (some == 0) break;
      for (int64_t token = 0; token < block.tokens;) {
        const int64_t left = block.tokens - token;
        const int power = left >= 4 ? 2 : left >= 2 ? 1 : 0;
        float found[kStreams * kMostTokens];
        some_rows.x = block.x + token * block.x_stride;
        multiply_by[power].of(some)(some_rows, found);
        for (int64_t stream = 0; stream < some; ++stream) {
          for (int64_t i = 0; i < int64_t{1} << power; ++i) {
            sums[stream][token + i][row] = scales[stream] * found[stream * kMostTokens + i];
          }
        }
        token += int64_t{1} << power;
      }
    }
    return true;
  }

  bool expand(int64_t tile, float* panel) const {
    const int64_t first = tile * packed_rows::kTileRows, count = std::min(packed_rows::kTileRows, rows - first);
    if (count < packed_rows::kTileRows) std::fill_n(panel, columns * kLanes, 0.0f);
    for (int64_t row = 0; row < count; ++row) {
      const int8_t* values = packed.values + (first + row) * columns;
      const float scale = packed.scales[first + row];
      for (int64_t j = 0; j < columns; ++j) panel[j * kLanes + row] = scale * static_cast<float>(values[j]);
    }
    return true;
  }
};

template <class T>
void multiply(
    const Int8Rows& packed, const void* x, int64_t tokens, int64_t columns, const void* bias, void* y, const Executor& executor) {
  const Isa isa = current_isa();
  const Int8Weight weight(packed, columns, isa);
  const Activations activations(static_cast<const T*>(x), tokens, columns, isa, executor);
  const Output<T> output{static_cast<T*>(y), packed.rows, nullptr, static_cast<const T*>(bias)};
  packed_product(weight, activations.block(), output, executor);  // it finds no fault: all values are sound
}

}  // namespace

void int8_linear(
    const void* x, DType dtype, int64_t tokens, int64_t columns, const Int8Rows& packed, const void* bias, void* y,
    const Executor& executor) {
  dispatch_dtype(
      dtype, [&](auto* type) { multiply<std::remove_pointer_t<decltype(type)>>(packed, x, tokens, columns, bias, y, executor); });
}

}  // namespace sparsekern::cpu
