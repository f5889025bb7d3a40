// Code shared by `bitmask_linear` and `nm_linear`: activations as floats, tiles of 16 rows handed to threads, and the path for many
// tokens. That path expands a few tiles into panels, which stay in the cache for a dense product with all tokens.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "common/dtype.h"
#include "common/packed_rows.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/panel_matrix.h"
#include "cpu/parallel.h"

namespace sparsekern::cpu {

constexpr int64_t kTogether = 8;  // tokens that share expanded registers
constexpr int64_t kStreams = 2;   // tiles read at the same time: two streams give a core more memory bandwidth than one
constexpr int64_t kTasksPerThread = 8,
                  kTaskBytes =
                      512 * 1024;  // most tasks per thread, fewest bytes per task: each task waits for its first cache lines

template <class T>
SPARSEKERN_INLINE void floats_of(const T* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
}

// A block of tokens as floats.
struct TokenBlock {
  const float* x;
  int64_t x_stride;
  int64_t tokens;

  TokenBlock part(int64_t first, int64_t count) const { return {x + first * x_stride, x_stride, count}; }
};

// Activations as floats. Each row is padded with zeros to a whole number of words of columns, and by one more word. Kernels then
// need no check at the end of a row, and have an element that is zero.
struct Activations {
  int64_t tokens, columns, stride;
  Buffer<float> data;

  template <class T>
  Activations(const T* x, int64_t tokens_, int64_t columns_, Isa isa, const Executor& executor)
      : Activations(x, tokens_, columns_, isa, executor, [](int64_t token) { return token; }) {}

  // Row `token` is row `row_of(token)` of x.
  template <class T, class RowOf>
  Activations(const T* x, int64_t tokens_, int64_t columns_, Isa isa, const Executor& executor, const RowOf& row_of)
      : tokens(tokens_),
        columns(columns_),
        stride((packed_rows::words(columns_) + 1) * packed_rows::kWordColumns),
        data(allocate<float>(tokens_ * stride)) {
    const auto convert = Entries<&floats_of<T>>::choose(isa);
    parallel_for(executor, tokens, 1 + 65536 / stride, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        float* row = data.get() + token * stride;
        convert(x + row_of(token) * columns, columns, row);
        std::fill(row + columns, row + stride, 0.0f);
      }
    });
  }

  TokenBlock block() const { return {data.get(), stride, tokens}; }
};

// Sums of up to kTogether tokens for the rows of a tile.
using TileSums = float[kTogether][packed_rows::kTileRows];

// A kernel for one stream, and for kStreams of them.
template <class Kernel>
struct ByStreams {
  Kernel one, all;

  Kernel of(int64_t streams) const { return streams == kStreams ? all : one; }
};

// Calls f(i) for 2^i tokens at a time, at most 8, until all tokens are done. Stops and returns false if f returns false.
template <class F>
bool for_token_groups(int64_t tokens, const F& f) {
  static_assert(kTogether == 8, "2^3");
  for (int64_t token = 0; token < tokens;) {
    const int64_t left = tokens - token;
    const int power = left >= 8 ? 3 : left >= 4 ? 2 : left >= 2 ? 1 : 0;
    if (!f(power)) return false;
    token += int64_t{1} << power;
  }
  return true;
}

// A weight in tiles of 16 stored rows is any type with
//   int64_t rows, columns;
//   int64_t bytes() const;                                  // approximate size of its packed form
//   int64_t first_tile(int64_t task, int64_t tasks) const;  // ascending; splits the work
//   bool multiply(const int64_t* tiles, int64_t count, const TokenBlock& block, TileSums* sums) const;  // up to kStreams,
//   ascending
//   bool expand(int64_t tile, float* panel) const;          // column j of the tile's rows to panel[16 * j], zeros included
//   bool expand_rows(int64_t tile, T* weight) const;        // the tile's rows to their rows of the dense weight
// A result of false says that the packed tensors contradict each other.

// The output: y[token][order[i]] = sum + bias[order[i]] for stored row i. Without `order`, the rows keep their stored order.
template <class T>
struct Output {
  T* y;
  int64_t rows;
  const int32_t* order;
  const T* bias;                    // null: none
  const int64_t* places = nullptr;  // the row of y for each token; null: in order

  T* at(int64_t token) const { return y + (places == nullptr ? token : places[token]) * rows; }

  void write(int64_t token, int64_t first, int64_t count, const float* sums) const {
    T* out = at(token);
    for (int64_t i = 0; i < count; ++i) out[row_of(first + i)] = from_float<T>(sums[i] + bias_of(first + i));
  }

  // As `write` for all tokens and a panel, but stored row i goes to y[token][i], which is contiguous; `put_in_order` reorders it
  // later.
  void write_stored(int64_t first, int64_t count, int64_t tokens, const float* sums) const {
    float added[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) added[i] = bias_of(first + i);
    for (int64_t token = 0; token < tokens; ++token) {
      T* out = at(token) + first;
      for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(sums[token * kLanes + i] + added[i]);
    }
  }

  void put_in_order(int64_t tokens, const Executor& executor) const {
    if (order == nullptr) return;
    parallel_for(executor, tokens, 1 + 65536 / (rows + 1), [&](int64_t begin, int64_t end) {
      const auto stored = allocate<T>(rows);
      for (int64_t token = begin; token < end; ++token) {
        T* out = at(token);
        std::copy_n(out, rows, stored.get());
        for (int64_t i = 0; i < rows; ++i) out[order[i]] = stored[i];
      }
    });
  }

 private:
  int64_t row_of(int64_t i) const { return order == nullptr ? i : order[i]; }
  float bias_of(int64_t i) const { return bias == nullptr ? 0.0f : to_float(bias[row_of(i)]); }
};

template <class Weight, class T>
bool multiply_tiles_by_few(
    const Weight& weight, const int64_t* tiles, int64_t count, const TokenBlock& x, const Output<T>& output) {
  for (int64_t token = 0; token < x.tokens; token += kTogether) {
    TileSums sums[kStreams];
    const TokenBlock block = x.part(token, std::min(kTogether, x.tokens - token));
    if (!weight.multiply(tiles, count, block, sums)) return false;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = tiles[i] * packed_rows::kTileRows, rows = std::min(packed_rows::kTileRows, weight.rows - row);
      for (int64_t j = 0; j < block.tokens; ++j) output.write(token + j, row, rows, sums[i][j]);
    }
  }
  return true;
}

// Multiplies the tiles of [first, end), one from each half at a time.
template <class Weight, class T>
bool multiply_range_by_few(const Weight& weight, int64_t first, int64_t end, const TokenBlock& x, const Output<T>& output) {
  static_assert(kStreams == 2, "of the halves");
  const int64_t half = (end - first + 1) / 2;
  bool sound = true;
  for (int64_t tile = first; tile < first + half; ++tile) {
    const int64_t tiles[kStreams] = {tile, tile + half};
    sound &= multiply_tiles_by_few(weight, tiles, tile + half < end ? 2 : 1, x, output);
  }
  return sound;
}

template <class Weight, class T>
bool multiply_tiles_by_many(
    const Weight& weight, int64_t first, int64_t count, const Multiplier& x, MultiplyAdd multiply_add, const Output<T>& output) {
  static_assert(packed_rows::kTileRows == kLanes, "a tile is a panel");
  const int64_t panel = weight.columns * kLanes, out_panel = x.outputs * kLanes;
  const auto expanded = allocate<float>(count * panel);
  const auto sums = allocate<float>(count * out_panel);
  for (int64_t i = 0; i < count; ++i) {
    if (!weight.expand(first + i, expanded.get() + i * panel)) return false;
  }
  std::fill_n(sums.get(), count * out_panel, 0.0f);
  multiply_add(x, weight.columns, x.outputs, 1.0f, expanded.get(), panel, sums.get(), out_panel, count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = (first + i) * kLanes;
    output.write_stored(row, std::min(kLanes, weight.rows - row), x.outputs, sums.get() + i * out_panel);
  }
  return true;
}

// Computes the product of many tokens. Returns false if the packed tensors contradict each other.
template <class Weight, class T>
bool product_of_many(const Weight& weight, const TokenBlock& x, const Output<T>& output, const Executor& executor) {
  std::atomic<bool> sound{true};
  const Multiplier multiplier = load_multiplier_transposed(x.x, x.x_stride, weight.columns, x.tokens, executor);
  const MultiplyAdd multiply_add = choose_multiply_add();
  for_each_tile(packed_rows::tiles(weight.rows), executor, [&](int64_t first, int64_t count) {
    if (!multiply_tiles_by_many(weight, first, count, multiplier, multiply_add, output)) sound = false;
  });
  output.put_in_order(x.tokens, executor);
  return sound;
}

// Computes the whole product. Returns false if the packed tensors contradict each other.
template <class Weight, class T>
bool packed_product(const Weight& weight, const TokenBlock& x, const Output<T>& output, const Executor& executor) {
  if (x.tokens > kFewTokens) return product_of_many(weight, x, output, executor);
  std::atomic<bool> sound{true};
  const int64_t threads = std::max(executor.threads, 1), each = weight.bytes() / (threads * kTaskBytes);
  const int64_t tasks =
      std::min(packed_rows::tiles(weight.rows), threads == 1 ? 1 : threads * std::clamp<int64_t>(each, 1, kTasksPerThread));
  parallel_tasks(executor, tasks, [&](int64_t task) {
    if (!multiply_range_by_few(weight, weight.first_tile(task, tasks), weight.first_tile(task + 1, tasks), x, output))
      sound = false;
  });
  return sound;
}

// Expands the dense weight. Returns false if the packed tensors contradict each other.
template <class Weight, class T>
bool expand_all(const Weight& weight, T* dense, const Executor& executor) {
  std::atomic<bool> sound{true};
  parallel_for(executor, packed_rows::tiles(weight.rows), 1 + 1024 / (weight.columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      if (!weight.expand_rows(tile, dense)) sound = false;
    }
  });
  return sound;
}

}  // namespace sparsekern::cpu
