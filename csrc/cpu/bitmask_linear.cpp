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

// Some tokens against rows of the weight.
struct Factors {
  const Unit* last;  // the last unit from which a word of bits may be read
  int64_t words;
  const float* x;    // of the first token
  int64_t x_stride;
};

// Rows whose values share units. A product moves `units` behind the group and stores sums[token * kTileRows + lane].
struct Group {
  const Unit* units;
  const uint64_t* bits[2];  // of each row
  float* sums;
};

// Products of kTokens tokens with some groups. False where the bits lead out of the values.
template <class T, int kTokens>
bool multiply_scalar(const Factors& factors, Group* group) {
  const Unit* end = group->units;
  for (int row = 0; row < kUnitValues<T>; ++row) {
    const Unit* unit = group->units;
    float sums[kTokens] = {};
    for (int64_t word = 0; word < factors.words; ++word) {
      if (unit > factors.last) return false;
      const float* x = factors.x + word * packed_rows::kWordColumns;
      for (uint64_t bits = group->bits[row][word]; bits != 0; bits &= bits - 1) {
        const float value = value_of<T>(unit++, row);
        for (int token = 0; token < kTokens; ++token) sums[token] += value * x[token * factors.x_stride + __builtin_ctzll(bits)];
      }
    }
    for (int token = 0; token < kTokens; ++token) group->sums[token * packed_rows::kTileRows + row] = sums[token];
    end = std::max(end, unit);
  }
  group->units = end;
  return true;
}

#if SPARSEKERN_X86

template <class T, int kTokens, int kGroups>
SPARSEKERN_AVX512 bool multiply_avx512(const Factors& factors, Group* groups) {
  constexpr int kRows = kUnitValues<T>;
  const auto [last, words, x, x_stride] = factors;
  __m512 sums[kGroups][kRows][kTokens];
  const Unit* unit[kGroups][kRows];
  const uint64_t* bits[kGroups][kRows];
#pragma GCC unroll 2
  for (int group = 0; group < kGroups; ++group) {
#pragma GCC unroll 2
    for (int row = 0; row < kRows; ++row) {
      unit[group][row] = groups[group].units;
      bits[group][row] = groups[group].bits[row];
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) sums[group][row][token] = _mm512_setzero_ps();
    }
  }
  for (int64_t word = 0; word < words; ++word) {
#pragma GCC unroll 2
    for (int group = 0; group < kGroups; ++group) {
#pragma GCC unroll 2
      for (int row = 0; row < kRows; ++row) {
        if (__builtin_expect(unit[group][row] > last, 0)) return false;
        prefetch_ahead(unit[group][0] + 16 * row);
      }
    }
    if (word % 8 == 0) {  // a line of bits: that of the next group
      for (int group = 0; group < kGroups; ++group) {
        for (int row = 0; row < kRows; ++row) prefetch_ahead(bits[group][row] + word, kRows * words * 8);
      }
    }
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      __m512 features[kTokens];
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        features[token] = _mm512_loadu_ps(x + token * x_stride + word * packed_rows::kWordColumns + part * 16);
      }
#pragma GCC unroll 2
      for (int group = 0; group < kGroups; ++group) {
#pragma GCC unroll 2
        for (int row = 0; row < kRows; ++row) {
          const uint32_t mask = bits_of_part(bits[group][row] + word, part);
          const __m512i units = _mm512_maskz_expandloadu_epi32(static_cast<__mmask16>(mask), unit[group][row]);
          const __m512 weight = floats_of_units<T>(units, row);
          unit[group][row] += __builtin_popcount(mask);
#pragma GCC unroll 8
          for (int token = 0; token < kTokens; ++token) {
            sums[group][row][token] = _mm512_fmadd_ps(weight, features[token], sums[group][row][token]);
          }
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int group = 0; group < kGroups; ++group) {
#pragma GCC unroll 2
    for (int row = 0; row < kRows; ++row) {
      groups[group].units = std::max(groups[group].units, unit[group][row]);
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        groups[group].sums[token * packed_rows::kTileRows + row] = add_up(sums[group][row][token]);
      }
    }
  }
  return true;
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
SPARSEKERN_AVX2 bool multiply_avx2(const Factors& factors, Group* group) {
  __m256 sums[kUnitValues<T>][kTokens];
  const Unit* unit[kUnitValues<T>];
  for (int row = 0; row < kUnitValues<T>; ++row) {
    unit[row] = group->units;
    for (int token = 0; token < kTokens; ++token) sums[row][token] = _mm256_setzero_ps();
  }
  for (int64_t word = 0; word < factors.words; ++word) {
    for (int row = 0; row < kUnitValues<T>; ++row) {
      if (__builtin_expect(unit[row] > factors.last, 0)) return false;
      prefetch_ahead(unit[0] + 16 * row);
    }
    for (int part = 0; part < 8; ++part) {
      const float* x = factors.x + word * packed_rows::kWordColumns + part * 8;
      __m256 weight[kUnitValues<T>];
      for (int row = 0; row < kUnitValues<T>; ++row) {
        const uint8_t bits = reinterpret_cast<const uint8_t*>(group->bits[row] + word)[part];
        const __m256i places = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPlaces.of[bits]));
        const __m256i units = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(unit[row])), places);
        weight[row] = floats_of_units<T>(_mm256_andnot_si256(_mm256_srai_epi32(places, 31), units), row);
        unit[row] += __builtin_popcount(bits);
      }
      for (int token = 0; token < kTokens; ++token) {
        const __m256 features = _mm256_loadu_ps(x + token * factors.x_stride);
        for (int row = 0; row < kUnitValues<T>; ++row) sums[row][token] = _mm256_fmadd_ps(weight[row], features, sums[row][token]);
      }
    }
  }
  for (int row = 0; row < kUnitValues<T>; ++row) {
    group->units = std::max(group->units, unit[row]);
    for (int token = 0; token < kTokens; ++token) group->sums[token * packed_rows::kTileRows + row] = add_up(sums[row][token]);
  }
  return true;
}

#endif

using Multiply = bool (*)(const Factors&, Group*);

// For one group, and for two.
struct Multiplies {
  Multiply one, two;
};

template <Multiply kOne>
bool one_by_one(const Factors& factors, Group* groups) {
  return kOne(factors, groups) && kOne(factors, groups + 1);
}

template <class T, int kTokens>
Multiplies choose_multiply([[maybe_unused]] Isa isa) {
#if SPARSEKERN_X86
  if (isa >= Isa::avx512) {
    constexpr Multiply one = &multiply_avx512<T, kTokens, 1>;
    if constexpr (kTokens > 4) return {one, &one_by_one<one>};  // the registers of two would not do
    else return {one, &multiply_avx512<T, kTokens, 2>};
  }
  if (isa >= Isa::avx2) return {&multiply_avx2<T, kTokens>, &one_by_one<&multiply_avx2<T, kTokens>>};
#endif
  return {&multiply_scalar<T, kTokens>, &one_by_one<&multiply_scalar<T, kTokens>>};
}

template <class T>
struct BitmaskWeight {
  int64_t rows, columns;
  const BitmaskRows& packed;
  const Unit* units;
  int64_t count;                          // units without the slack
  int64_t words;
  std::vector<uint64_t> no_bits;          // of the row that a last group may lack
  Isa isa = current_isa();                // asked for once: it reads the environment
  Multiplies multiply_by[4] = {choose_multiply<T, 1>(isa), choose_multiply<T, 2>(isa), choose_multiply<T, 4>(isa), choose_multiply<T, 8>(isa)};

  BitmaskWeight(const BitmaskRows& p, int64_t columns_)
      : rows(p.rows),
        columns(columns_),
        packed(p),
        units(static_cast<const Unit*>(p.values)),
        count(p.value_count / kUnitValues<T> - packed_rows::kSlack),
        words(packed_rows::words(columns_)),
        no_bits(static_cast<size_t>(words)) {}

  int64_t bytes() const { return count * static_cast<int64_t>(sizeof(Unit)) + rows * words * 8; }

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

  bool multiply(const int64_t* tiles, int64_t given, const TokenBlock& block, TileSums* sums) const {
    const Unit* next[kStreams];
    for (int64_t i = 0; i < given; ++i) next[i] = units + packed.starts[tiles[i]];
    for (int64_t row = 0; row < packed_rows::kTileRows; row += kUnitValues<T>) {
      Group groups[kStreams];
      int64_t some = 0;
      for (; some < given && tiles[some] * packed_rows::kTileRows + row < rows; ++some) {  // only the last tile may end early
        const int64_t first = tiles[some] * packed_rows::kTileRows + row;
        groups[some] = {next[some], {bits_of(first), bits_of(first + 1)}, &sums[some][0][row]};
      }
      if (some == 0) break;
      if (!multiply_groups(groups, some, block)) return false;
      for (int64_t i = 0; i < some; ++i) next[i] = groups[i].units;
    }
    return true;
  }

  bool multiply_groups(Group* groups, int64_t some, const TokenBlock& block) const {
    Factors factors{units + count, words, block.x, block.x_stride};
    const Unit* first[kStreams];
    for (int64_t i = 0; i < some; ++i) first[i] = groups[i].units;
    for (int64_t token = 0; token < block.tokens;) {
      const int64_t left = block.tokens - token;
      const int power = left >= 8 ? 3 : left >= 4 ? 2 : left >= 2 ? 1 : 0;
      for (int64_t i = 0; i < some; ++i) groups[i].units = first[i];
      if (!(some == 2 ? multiply_by[power].two : multiply_by[power].one)(factors, groups)) return false;
      factors.x += block.x_stride << power;
      for (int64_t i = 0; i < some; ++i) groups[i].sums += packed_rows::kTileRows << power;
      token += int64_t{1} << power;
    }
    return true;
  }

  bool expand(int64_t tile, float* panel) const {
    const int64_t first = tile * packed_rows::kTileRows;
#if SPARSEKERN_X86
    if (isa >= Isa::avx512) {
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
      if (isa >= Isa::avx512) {
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
  const BitmaskWeight<T> weight(packed, columns);
  const Activations activations(static_cast<const T*>(x), tokens, columns, weight.isa, executor);
  const Output<T> output{static_cast<T*>(y), packed.rows, packed.order, static_cast<const T*>(bias)};
  return packed_product(weight, activations, output, executor);
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
