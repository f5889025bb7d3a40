// nm_q4_linear: x W^T + b from an N:M weight with 4-bit values (common/nm_q4.h), and from x in 8 bits.
//
// Floor for one token: the packed bytes. 2:4 takes 3.25 bits a weight (2 of values, 1 of positions, 0.25 of scales), a fifth of the time
// to read 16-bit weights. 1:4 takes 1.75 bits and 4:16 takes 2.25.
//
// The positions of 32 values are bytes, so one shuffle of 16 columns of x fetches the factors of 32 values: of 4 rows of 2:4, or of 8
// rows of the others. No tables and no counts are needed, and no block depends on the one before. Values are stored plus 8, because
// vpmaddubsw multiplies unsigned by signed bytes; 8 times the fetched factors is subtracted. For 2:4 with AVX2, 64 weights take a
// shift, two masks, an `or`, a shuffle, two products, two sums, and a share of loads and of the 14 instructions that end a block: 0.22
// instructions a weight.
//
// Up to kMostTokens tokens share the unpacking. Many tokens are a dense product with the expanded weight (packed_linear.h), of x as its
// 8 bits represent it. Of a token's result, only the order of sums depends on how many tokens a call has.
#include <algorithm>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/nm_q4_multiply.h"
#include "cpu/packed_linear.h"

namespace sparsekern::cpu {

namespace {

using nm_q4_multiply::kMostRows;
using nm_q4_multiply::kMostTokens;

// The weight in tiles of 16 rows, as packed_linear.h multiplies by it.
struct Q4Weight {
  int64_t rows, columns;
  NmQ4Rows packed;

  const uint8_t* strip(int64_t i) const { return packed.blocks + i * nm_q4::blocks(columns) * packed.layout.bytes(); }

  // Calls f(row, column, weight) for each stored value of rows [first, end).
  template <class F>
  void for_each_weight(int64_t first, int64_t end, const F& f) const {
    const nm_q4::Layout layout = packed.layout;
    for (int64_t row = first; row < end; ++row) {
      const int64_t own = row % layout.rows();
      for (int64_t begin = 0; begin < columns; begin += nm_q4::kColumns) {
        const uint8_t* block = strip(row / layout.rows()) + begin / nm_q4::kColumns * layout.bytes();
        const float scale = nm_q4_multiply::scale_of(block, layout, own);
        nm_q4_multiply::for_each_value(block, layout, own, [&](int64_t column, int32_t value) {
          if (begin + column < columns) f(row, begin + column, scale * static_cast<float>(value));
        });
      }
    }
  }

  bool expand(int64_t tile, float* panel) const {
    std::fill_n(panel, columns * kLanes, 0.0f);
    const int64_t first = tile * kLanes;
    for_each_weight(first, std::min(rows, first + kLanes), [&](int64_t row, int64_t column, float value) {
      panel[column * kLanes + row - first] = value;
    });
    return true;
  }
};

template <class T>
void multiply_few(
    const Q4Weight& weight, const QuantisedTokens& x, int64_t tokens, const Output<T>& output, Isa isa, const Executor& executor) {
  const nm_q4::Layout layout = weight.packed.layout;
  const nm_q4_multiply::MultiplyStrip multiply[3] = {
      nm_q4_multiply::choose_multiply(layout, isa, 0), nm_q4_multiply::choose_multiply(layout, isa, 1),
      nm_q4_multiply::choose_multiply(layout, isa, 2)};
  const int64_t strips = layout.strips(weight.rows), threads = std::max(executor.threads, 1);
  const int64_t each = strips * x.blocks * layout.bytes() / (threads * kTaskBytes);
  const int64_t tasks = std::min(strips, threads == 1 ? 1 : threads * std::clamp<int64_t>(each, 1, kTasksPerThread));
  parallel_tasks(executor, tasks, [&](int64_t task) {
    float sums[kMostTokens * kMostRows];
    for (int64_t strip = strips * task / tasks; strip < strips * (task + 1) / tasks; ++strip) {
      const int64_t row = strip * layout.rows(), rows = std::min(layout.rows(), weight.rows - row);
      for (int64_t token = 0; token < tokens;) {
        const int64_t left = tokens - token;
        const int power = left >= 4 ? 2 : left >= 2 ? 1 : 0;
        multiply[power](weight.strip(strip), x.from(token), sums);
        for (int64_t i = 0; i < int64_t{1} << power; ++i) output.write(token + i, row, rows, sums + i * kMostRows);
        token += int64_t{1} << power;
      }
    }
  });
}

template <class T>
void multiply_many(
    const Q4Weight& weight, const QuantisedActivations& x, int64_t tokens, const Output<T>& output, const Executor& executor) {
  const auto restored = allocate<float>(tokens * weight.columns);
  parallel_for(executor, tokens, 1 + 65536 / (weight.columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) x.restore(token, weight.columns, restored.get() + token * weight.columns);
  });
  product_of_many(weight, {restored.get(), weight.columns, tokens}, output, executor);
}

template <class T>
void multiply(
    const NmQ4Rows& packed, const void* x, int64_t tokens, int64_t columns, const void* bias, void* y, const Executor& executor) {
  const Isa isa = current_isa();
  const Q4Weight weight{packed.rows, columns, packed};
  const QuantisedActivations quantised(static_cast<const T*>(x), tokens, columns, isa, executor);
  const Output<T> output{static_cast<T*>(y), packed.rows, nullptr, static_cast<const T*>(bias)};
  if (tokens <= kFewQ4Tokens) {
    multiply_few(weight, quantised.tokens(), tokens, output, isa, executor);
  } else {
    multiply_many(weight, quantised, tokens, output, executor);
  }
}

}  // namespace

void nm_q4_linear(
    const void* x, DType dtype, int64_t tokens, int64_t columns, const NmQ4Rows& packed, const void* bias, void* y,
    const Executor& executor) {
  dispatch_dtype(
      dtype, [&](auto* type) { multiply<std::remove_pointer_t<decltype(type)>>(packed, x, tokens, columns, bias, y, executor); });
}

}  // namespace sparsekern::cpu
