// bitmask_linear: x W^T + b from the non-zeros of W and one bit a weight.
//
// One token is bound by the memory: rows * columns * (2 d + 1/8) bytes of a half weight with the share d of non-zeros, so at d = 1/2
// nothing can be faster than 9/16 of the time that reading the dense weight takes. Below that lies the arithmetic: an AVX-512 core
// without VBMI2 spreads 16 values of 4 bytes (vpexpandd) in two cycles of its one shuffle port, and the mask takes a third, so 16
// weights take at least 3 cycles whatever d is, 32 GB/s of dense bf16 weights at 3 GHz. Hence the layout: two rows share a unit of 4
// bytes, so that their 16-bit values need no shuffle to become floats (a shift, a mask), and both are multiplied by the same x.
// Nothing else uses the shuffle port; values and bits are two streams that are read in order, prefetched 4 KiB ahead.
// A few tokens share the expanded registers. Many are a dense product of panels (packed_linear.h), bound by arithmetic.
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/bitmask_rows.h"
#include "cpu/kernels.h"
#include "cpu/packed_linear.h"
#include "cpu/unit_floats.h"

namespace sparsekern::cpu {

namespace {

// Rows whose values share units, some of whose products one call sums up.
struct Group {
  const Unit* units;
  const Unit* last;          // the last unit from which a word of bits may be read
  const uint64_t* bits[2];   // of each row
  int64_t words;
  const float* x;            // of the first token
  int64_t x_stride;
  float* sums;               // sums[token * sums_stride + lane]
  int64_t sums_stride;
};

// Adds up the products of a group with kTokens tokens. Returns the unit after the group, null where the bits lead out of the values.
template <class T, int kTokens>
const Unit* multiply_scalar(const Group& group) {
  const Unit* end = group.units;
  for (int row = 0; row < kUnitValues<T>; ++row) {
    const Unit* unit = group.units;
    float sums[kTokens] = {};
    for (int64_t word = 0; word < group.words; ++word) {
      if (unit > group.last) return nullptr;
      const float* x = group.x + word * packed_rows::kWordColumns;
      for (uint64_t bits = group.bits[row][word]; bits != 0; bits &= bits - 1) {
        const float value = value_of<T>(unit++, row);
        for (int token = 0; token < kTokens; ++token) sums[token] += value * x[token * group.x_stride + __builtin_ctzll(bits)];
      }
    }
    for (int token = 0; token < kTokens; ++token) group.sums[token * group.sums_stride + row] = sums[token];
    end = std::max(end, unit);
  }
  return end;
}

#if SPARSEKERN_X86

template <class T, int kTokens>
SPARSEKERN_AVX512 const Unit* multiply_avx512(const Group& group) {
  constexpr int kRows = kUnitValues<T>;
  const auto [units, last, bits, words, x, x_stride, out, out_stride] = group;
  __m512 sums[kRows][kTokens];
  const Unit* unit[kRows];
#pragma GCC unroll 2
  for (int row = 0; row < kRows; ++row) {
    unit[row] = units;
#pragma GCC unroll 8
    for (int token = 0; token < kTokens; ++token) sums[row][token] = _mm512_setzero_ps();
  }
  for (int64_t word = 0; word < words; ++word) {
#pragma GCC unroll 2
    for (int row = 0; row < kRows; ++row) {
      if (__builtin_expect(unit[row] > last, 0)) return nullptr;
      prefetch_ahead(unit[0] + 16 * row);
    }
    if (word % 8 == 0) {  // a line of bits: that of the next group
      for (int row = 0; row < kRows; ++row) prefetch_ahead(bits[row] + word, kRows * words * 8);
    }
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const float* features = x + word * packed_rows::kWordColumns + part * 16;
      __m512 weight[kRows];
#pragma GCC unroll 2
      for (int row = 0; row < kRows; ++row) {
        const uint32_t mask = bits_of_part(bits[row] + word, part);
        weight[row] = floats_of_units<T>(_mm512_maskz_expandloadu_epi32(static_cast<__mmask16>(mask), unit[row]), row);
        unit[row] += __builtin_popcount(mask);
      }
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        const __m512 feature = _mm512_loadu_ps(features + token * x_stride);
#pragma GCC unroll 2
        for (int row = 0; row < kRows; ++row) sums[row][token] = _mm512_fmadd_ps(weight[row], feature, sums[row][token]);
      }
    }
  }
  const Unit* end = units;
#pragma GCC unroll 2
  for (int row = 0; row < kRows; ++row) {
    end = std::max(end, unit[row]);
#pragma GCC unroll 8
    for (int token = 0; token < kTokens; ++token) out[token * out_stride + row] = add_up(sums[row][token]);
  }
  return end;
}

// For each byte of bits the place of each column's value, with the sign bit set where there is none.
struct Places {
  alignas(32) int32_t of[256][8];
};

constexpr Places make_places() {
  Places places{};
  for (int bits = 0; bits < 256; ++bits) {
    int next = 0;
    for (int column = 0; column < 8; ++column) places.of[bits][column] = bits >> column & 1 ? next++ : INT32_MIN;
  }
  return places;
}
constexpr Places kPlaces = make_places();

template <class T, int kTokens>
SPARSEKERN_AVX2 const Unit* multiply_avx2(const Group& group) {
  __m256 sums[kUnitValues<T>][kTokens];
  const Unit* unit[kUnitValues<T>];
  for (int row = 0; row < kUnitValues<T>; ++row) {
    unit[row] = group.units;
    for (int token = 0; token < kTokens; ++token) sums[row][token] = _mm256_setzero_ps();
  }
  for (int64_t word = 0; word < group.words; ++word) {
    for (int row = 0; row < kUnitValues<T>; ++row) {
      if (__builtin_expect(unit[row] > group.last, 0)) return nullptr;
      prefetch_ahead(unit[0] + 16 * row);
    }
    for (int part = 0; part < 8; ++part) {
      const float* x = group.x + word * packed_rows::kWordColumns + part * 8;
      __m256 weight[kUnitValues<T>];
      for (int row = 0; row < kUnitValues<T>; ++row) {
        const uint8_t bits = reinterpret_cast<const uint8_t*>(group.bits[row] + word)[part];
        const __m256i places = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPlaces.of[bits]));
        const __m256i units = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(unit[row])), places);
        weight[row] = floats_of_units<T>(_mm256_andnot_si256(_mm256_srai_epi32(places, 31), units), row);
        unit[row] += __builtin_popcount(bits);
      }
      for (int token = 0; token < kTokens; ++token) {
        const __m256 features = _mm256_loadu_ps(x + token * group.x_stride);
        for (int row = 0; row < kUnitValues<T>; ++row) sums[row][token] = _mm256_fmadd_ps(weight[row], features, sums[row][token]);
      }
    }
  }
  const Unit* end = group.units;
  for (int row = 0; row < kUnitValues<T>; ++row) {
    end = std::max(end, unit[row]);
    for (int token = 0; token < kTokens; ++token) group.sums[token * group.sums_stride + row] = add_up(sums[row][token]);
  }
  return end;
}

#endif

using Multiply = const Unit* (*)(const Group&);

template <class T, int kTokens>
Multiply choose_multiply() {
#if SPARSEKERN_X86
  if (current_isa() >= Isa::avx512) return &multiply_avx512<T, kTokens>;
  if (current_isa() >= Isa::avx2) return &multiply_avx2<T, kTokens>;
#endif
  return &multiply_scalar<T, kTokens>;
}

template <class T>
struct BitmaskWeight {
  int64_t rows, columns;
  const BitmaskRows& packed;
  const Unit* units;
  int64_t count;                          // units without the slack
  int64_t words;
  std::vector<uint64_t> no_bits;          // of the row that a last group may lack
  Multiply multiply_one = choose_multiply<T, 1>(), multiply_two = choose_multiply<T, 2>(), multiply_four = choose_multiply<T, 4>(),
           multiply_eight = choose_multiply<T, 8>();

  BitmaskWeight(const BitmaskRows& p, int64_t columns_)
      : rows(p.rows),
        columns(columns_),
        packed(p),
        units(static_cast<const Unit*>(p.values)),
        count(p.value_count / kUnitValues<T> - packed_rows::kSlack),
        words(packed_rows::words(columns_)),
        no_bits(static_cast<size_t>(words)) {}

  // Tasks of about equal numbers of values.
  int64_t first_tile(int64_t task, int64_t tasks) const {
    const int64_t tiles = packed_rows::tiles(rows);
    if (task == tasks) return tiles;
    const int64_t begin = packed.starts[0], all = packed.starts[tiles] - begin;
    const int64_t unit = begin + all / tasks * task + all % tasks * task / tasks;
    return task == 0 ? 0 : std::lower_bound(packed.starts, packed.starts + tiles, unit) - packed.starts;
  }

  const uint64_t* bits_of(int64_t row) const {
    return row < rows ? packed.bits + row * words : no_bits.data();
  }

  bool multiply(int64_t tile, const TokenBlock& block) const {
    const int64_t first = tile * packed_rows::kTileRows, end = std::min(rows, first + packed_rows::kTileRows);
    const Unit* next = units + packed.starts[tile];
    for (int64_t row = first; row < end; row += kUnitValues<T>) {
      float sums[kTogether * 2] = {};  // those of the row that a last group may lack go nowhere
      next = multiply_group(
          {next, units + count, {bits_of(row), bits_of(row + 1)}, words, block.x, block.x_stride, sums, 2}, block.tokens);
      if (next == nullptr) return false;
      for (int64_t lane = 0; lane < std::min<int64_t>(kUnitValues<T>, end - row); ++lane) {
        float* out = block.sums + row - first + lane;
        for (int64_t token = 0; token < block.tokens; ++token) out[token * block.sums_stride] = sums[2 * token + lane];
      }
    }
    return true;
  }

  const Unit* multiply_group(Group group, int64_t tokens) const {
    const Unit* end = group.units;
    for (int64_t token = 0; token < tokens && end != nullptr;) {
      const int64_t left = tokens - token;
      const int64_t taken = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      end = (taken == 8 ? multiply_eight : taken == 4 ? multiply_four : taken == 2 ? multiply_two : multiply_one)(group);
      group.x += taken * group.x_stride;
      group.sums += taken * group.sums_stride;
      token += taken;
    }
    return end;
  }

  bool expand(int64_t tile, float* panel) const {
    const int64_t first = tile * packed_rows::kTileRows;
#if SPARSEKERN_X86
    if (current_isa() >= Isa::avx512) {
      const std::optional<TileRows> found = rows_of(tile);
      if (!found) return false;
      if (found->rows < kLanes) std::fill_n(panel, columns * kLanes, 0.0f);
      expand_panel_avx512<T>(*found, columns, panel);
      return true;
    }
#endif
    std::fill_n(panel, columns * kLanes, 0.0f);
    return for_each_value(tile, [=](int64_t row, int64_t column, T value) { panel[column * kLanes + row - first] = to_float(value); });
  }

  // Nothing where the bits ask for more values or columns than there are.
  std::optional<TileRows> rows_of(int64_t tile) const {
    const int64_t first = tile * packed_rows::kTileRows;
    const int64_t left_out = words * packed_rows::kWordColumns - columns;  // bits of the last word
    TileRows found{{}, {}, static_cast<int>(std::min(packed_rows::kTileRows, rows - first))};
    const Unit* next = units + packed.starts[tile];
    for (int row = 0; row < found.rows; row += kUnitValues<T>) {
      int64_t longest = 0;
      for (int i = row; i < std::min(found.rows, row + kUnitValues<T>); ++i) {
        found.units[i] = next;
        found.bits[i] = bits_of(first + i);
        if (left_out != 0 && found.bits[i][words - 1] >> (packed_rows::kWordColumns - left_out) != 0) return {};
        int64_t values = 0;
        for (int64_t word = 0; word < words; ++word) values += __builtin_popcountll(found.bits[i][word]);
        longest = std::max(longest, values);
      }
      next += longest;
      if (next > units + count) return {};
    }
    return found;
  }

  // The tile's rows to where they belong in the dense weight.
  bool expand_rows(int64_t tile, T* weight) const {
    const int64_t first = tile * packed_rows::kTileRows, end = std::min(rows, first + packed_rows::kTileRows);
#if SPARSEKERN_X86
    if constexpr (sizeof(T) == 2) {
      if (current_isa() >= Isa::avx512) {
        const Unit* next = units + packed.starts[tile];
        for (int64_t row = first; row < end && next != nullptr; row += 2) {
          auto* out = reinterpret_cast<uint16_t*>(weight);
          next = expand_avx512(
              next, units + count, {bits_of(row), bits_of(row + 1)}, columns,
              {out + packed.order[row] * columns, row + 1 < end ? out + packed.order[row + 1] * columns : nullptr});
        }
        return next != nullptr;
      }
    }
#endif
    for (int64_t row = first; row < end; ++row) std::fill_n(weight + packed.order[row] * columns, columns, T{});
    return for_each_value(tile, [&](int64_t row, int64_t column, T value) { weight[packed.order[row] * columns + column] = value; });
  }

  // f(row, column, value) for each value of a tile.
  template <class F>
  bool for_each_value(int64_t tile, const F& f) const {
    const int64_t first = tile * packed_rows::kTileRows, end = std::min(rows, first + packed_rows::kTileRows);
    const Unit* next = units + packed.starts[tile];
    for (int64_t row = first; row < end; row += kUnitValues<T>) {
      const Unit* longest = next;
      for (int lane = 0; lane < kUnitValues<T> && row + lane < end; ++lane) {
        const T* value = reinterpret_cast<const T*>(next) + lane;
        const uint64_t* bits = bits_of(row + lane);
        for (int64_t word = 0; word < words; ++word) {
          if (reinterpret_cast<const Unit*>(value - lane) > units + count) return false;
          for (uint64_t left = bits[word]; left != 0; left &= left - 1) {
            const int64_t column = word * packed_rows::kWordColumns + __builtin_ctzll(left);
            if (column >= columns) return false;
            f(row + lane, column, *value);
            value += kUnitValues<T>;
          }
        }
        longest = std::max(longest, reinterpret_cast<const Unit*>(value - lane));
      }
      next = longest;
    }
    return true;
  }
};

template <class T>
bool multiply(const BitmaskRows& packed, const void* x, int64_t tokens, int64_t columns, const void* bias, void* y, const Executor& executor) {
  const Activations activations(static_cast<const T*>(x), tokens, columns, executor);
  const Output<T> output{static_cast<T*>(y), packed.rows, packed.order, static_cast<const T*>(bias)};
  return packed_product(BitmaskWeight<T>(packed, columns), activations, output, executor);
}

// What would lead a kernel out of the tensors, the bits apart: those are followed with care.
void check_places(const BitmaskRows& packed, DType dtype) {
  const int64_t tiles = packed_rows::tiles(packed.rows), units = packed.value_count / packed_rows::lanes(size_of(dtype)) - packed_rows::kSlack;
  for (int64_t tile = 0; tile <= tiles; ++tile) {
    if (packed.starts[tile] < (tile == 0 ? 0 : packed.starts[tile - 1]) || packed.starts[tile] > units) {
      throw std::invalid_argument(
          "starts: expected ascending places of the " + std::to_string(units) + " units, got " + std::to_string(packed.starts[tile]));
    }
  }
  bool inside = true;
  for (int64_t i = 0; i < packed.rows; ++i) inside &= static_cast<uint32_t>(packed.order[i]) < static_cast<uint64_t>(packed.rows);
  if (inside) return;
  const int32_t* outside = std::find_if(
      packed.order, packed.order + packed.rows, [&](int32_t row) { return row < 0 || row >= packed.rows; });
  throw std::invalid_argument(
      "order: expected rows from 0 to " + std::to_string(packed.rows - 1) + ", got " + std::to_string(*outside));
}

void check_bits(bool sound) {
  if (!sound) throw std::invalid_argument("bitmask: expected bits for the values there are, got more");
}

}  // namespace

void bitmask_linear(
    const void* x,
    DType dtype,
    int64_t tokens,
    int64_t columns,
    const BitmaskRows& packed,
    const void* bias,
    void* y,
    const Executor& executor) {
  check_places(packed, dtype);
  check_bits(dispatch_dtype(dtype, [&](auto* type) {
    return multiply<std::remove_pointer_t<decltype(type)>>(packed, x, tokens, columns, bias, y, executor);
  }));
}

void bitmask_expand(const BitmaskRows& packed, DType dtype, int64_t columns, void* weight, const Executor& executor) {
  check_places(packed, dtype);
  check_bits(dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return expand_all(BitmaskWeight<T>(packed, columns), static_cast<T*>(weight), executor);
  }));
}

}  // namespace sparsekern::cpu
