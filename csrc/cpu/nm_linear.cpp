// nm_linear: x W^T + b from the kept values of an N:M weight and their positions.
//
// Floor for one token: the packed bytes. A row of 2:4 16-bit values takes columns * (1 + 1/8) bytes, 9/16 of the time to read the
// dense weight. Values are not spread to their columns; their factors are gathered from x. A block holds the values of 32 columns
// for each half of its slots. With AVX-512, one vpermt2ps of two registers of x then gives the factors of 16 values. The positions
// come from one word by shifts, one register each. 64 columns take about 5 cycles, less than reading them from memory. The same
// holds for 1:2, 4:8 and 8:16; other patterns gather x with vector gathers.
//
// A few tokens share values and positions; many tokens are a dense product (packed_linear.h).
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/packed_linear.h"
#include "cpu/slot_floats.h"

namespace sparsekern::cpu {

namespace {

using packed_rows::kBlockSlots;
using packed_rows::Slot;

// Factors: a few tokens that are multiplied by rows of the weight.
struct Factors {
  int64_t blocks;                // blocks of a row
  const int32_t* group_columns;  // the first column of the group of each value
  int code_bits;
  int64_t n;
  const float* x;  // the first token
  int64_t x_stride;
};

// A row of the weight; a product stores sums[token * kTileRows].
struct Row {
  const Slot* slots;
  const uint32_t* codes;
  float* sums;
};

SPARSEKERN_INLINE int32_t position_of(const uint32_t* codes, int64_t k, int code_bits) {
  const int64_t bit = k * code_bits;
  return static_cast<int32_t>(codes[bit / 32] >> bit % 32 & ((1u << code_bits) - 1));
}

// Multiplies kTokens tokens by several rows.
template <class T, int kTokens>
SPARSEKERN_INLINE void multiply_any(const Factors& factors, const Row* row) {
  float sums[kTokens] = {};
  for (int64_t block = 0; block < factors.blocks; ++block) {
    for (int run = 0; run < kSlotValues<T>; ++run) {
      for (int64_t d = 0; d < kBlockSlots; ++d) {
        const int64_t k = (block * kSlotValues<T> + run) * kBlockSlots + d;
        const float value = value_of<T>(row->slots + block * kBlockSlots + d, run);
        const float* x = factors.x + factors.group_columns[k] + position_of(row->codes, k, factors.code_bits);
        for (int token = 0; token < kTokens; ++token) sums[token] += value * x[token * factors.x_stride];
      }
    }
  }
  for (int token = 0; token < kTokens; ++token) row->sums[token * packed_rows::kTileRows] = sums[token];
}

#if SPARSEKERN_X86

// Returns the positions of 16 values, with unrelated higher bits of their words above them. (Masked, here and below, because GCC 12
// warns that the unmasked intrinsics leave values uninitialised.)
template <bool kWide>
SPARSEKERN_AVX512 SPARSEKERN_INLINE __m512i codes_of_run(const uint32_t* codes, int64_t run) {
  if constexpr (!kWide) {
    const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_maskz_srlv_epi32(0xffff, _mm512_set1_epi32(static_cast<int>(codes[run])), shifts);
  } else {
    const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i low = _mm512_set1_epi32(static_cast<int>(codes[2 * run]));
    return _mm512_maskz_srlv_epi32(0xffff, _mm512_mask_set1_epi32(low, 0xff00, static_cast<int>(codes[2 * run + 1])), shifts);
  }
}

// N:2N with N of 1, 2, 4 or 8: the 16 values of a run come from 32 consecutive columns.
template <class T, int kTokens, bool kWide, int kRows>
SPARSEKERN_AVX512 void multiply_half_avx512(const Factors& factors, const Row* rows) {
  const __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto shift = static_cast<unsigned>(__builtin_ctzll(static_cast<uint64_t>(factors.n)));
  const auto groups = (__m512i)((__v16su)place >> shift << (shift + 1));
  const __m512i code = _mm512_set1_epi32(kWide ? 15 : 3);
  __m512 sums[kRows][kSlotValues<T>][kTokens];
  const Slot* slots[kRows];
  const uint32_t* codes[kRows];
#pragma GCC unroll 2
  for (int row = 0; row < kRows; ++row) {
    slots[row] = rows[row].slots;
    codes[row] = rows[row].codes;
#pragma GCC unroll 2
    for (int run = 0; run < kSlotValues<T>; ++run) {
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) sums[row][run][token] = _mm512_setzero_ps();
    }
  }
  const auto [blocks, group_columns, code_bits, n, x, x_stride] = factors;
  for (int64_t block = 0; block < blocks; ++block) {
    __m512i stored[kRows];
#pragma GCC unroll 2
    for (int row = 0; row < kRows; ++row) {
      prefetch_ahead(slots[row] + block * kBlockSlots);
      stored[row] = _mm512_loadu_si512(slots[row] + block * kBlockSlots);
    }
#pragma GCC unroll 2
    for (int run = 0; run < kSlotValues<T>; ++run) {
      const int64_t i = block * kSlotValues<T> + run;
#pragma GCC unroll 2
      for (int row = 0; row < kRows; ++row) {
        const __m512i columns =
            _mm512_ternarylogic_epi32(codes_of_run<kWide>(codes[row], i), code, groups, 0xea);  // (codes & code) | groups
        const __m512 weight = floats_of_slots<T>(stored[row], run);
#pragma GCC unroll 8
        for (int token = 0; token < kTokens; ++token) {
          const float* features = x + token * x_stride + i * 32;
          const __m512 picked = _mm512_permutex2var_ps(_mm512_loadu_ps(features), columns, _mm512_loadu_ps(features + 16));
          sums[row][run][token] = _mm512_fmadd_ps(weight, picked, sums[row][run][token]);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int token = 0; token < kTokens; ++token) {
      __m512 sum = sums[row][0][token];
      if constexpr (kSlotValues<T> == 2) sum = _mm512_add_ps(sum, sums[row][1][token]);
      rows[row].sums[token * packed_rows::kTileRows] = add_up(sum);
    }
  }
}

template <class T, int kTokens, bool kWide>
SPARSEKERN_AVX512 void multiply_any_avx512(const Factors& factors, const Row* row) {
  const __m512i code = _mm512_set1_epi32(kWide ? 15 : 3);
  __m512 sums[kTokens];
#pragma GCC unroll 8
  for (int token = 0; token < kTokens; ++token) sums[token] = _mm512_setzero_ps();
  const auto [slots, codes, out] = *row;
  const auto [blocks, group_columns, code_bits, n, x, x_stride] = factors;
  for (int64_t block = 0; block < blocks; ++block) {
    prefetch_ahead(slots + block * kBlockSlots);
    const __m512i stored = _mm512_loadu_si512(slots + block * kBlockSlots);
#pragma GCC unroll 2
    for (int run = 0; run < kSlotValues<T>; ++run) {
      const int64_t i = block * kSlotValues<T> + run;
      const auto positions = (__v16su)codes_of_run<kWide>(codes, i) & (__v16su)code;
      const __m512i columns = _mm512_add_epi32((__m512i)positions, _mm512_loadu_si512(group_columns + i * kBlockSlots));
      const __m512 weight = floats_of_slots<T>(stored, run);
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        const __m512 picked = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, columns, x + token * x_stride, 4);
        sums[token] = _mm512_fmadd_ps(weight, picked, sums[token]);
      }
    }
  }
#pragma GCC unroll 8
  for (int token = 0; token < kTokens; ++token) out[token * packed_rows::kTileRows] = add_up(sums[token]);
}

// Expands the rows of a tile, at most 16, to panel[16 * column + row], block by block, so that the output stays in L1. Uses
// `stored` values per row. Returns false if a position lies past the last column.
template <class T, bool kWide>
SPARSEKERN_AVX512 bool expand_panel_avx512(
    const Factors& factors, const Row* rows, int count, int64_t stored, int64_t columns, float* panel) {
  const __m512i code = _mm512_set1_epi32(kWide ? 15 : 3);
  const __m512i end = _mm512_set1_epi32(static_cast<int>(columns));
  for (int64_t block = 0; block < factors.blocks; ++block) {
    for (int row = 0; row < count; ++row) {
      const __m512i slots = _mm512_loadu_si512(rows[row].slots + block * kBlockSlots);
#pragma GCC unroll 2
      for (int run = 0; run < kSlotValues<T>; ++run) {
        const int64_t i = block * kSlotValues<T> + run;
        const auto positions = (__v16su)codes_of_run<kWide>(rows[row].codes, i) & (__v16su)code;
        const __m512i column = _mm512_add_epi32((__m512i)positions, _mm512_loadu_si512(factors.group_columns + i * kBlockSlots));
        const auto meant = static_cast<__mmask16>((1u << std::clamp<int64_t>(stored - i * kBlockSlots, 0, kBlockSlots)) - 1);
        if (_mm512_mask_cmpge_epu32_mask(meant, column, end) != 0) return false;
        static_assert(kLanes == 16, "of the shift");
        _mm512_mask_i32scatter_ps(panel + row, meant, (__m512i)((__v16su)column << 4), floats_of_slots<T>(slots, run), 4);
      }
    }
  }
  return true;
}

template <class T, int kTokens>
SPARSEKERN_AVX2 void multiply_any_avx2(const Factors& factors, const Row* row) {
  const bool wide = factors.code_bits == 4;
  const __m256i shifts = wide ? _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28) : _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const __m256i code = _mm256_set1_epi32((1 << factors.code_bits) - 1);
  __m256 sums[kTokens];
  for (int token = 0; token < kTokens; ++token) sums[token] = _mm256_setzero_ps();
  for (int64_t block = 0; block < factors.blocks; ++block) {
    prefetch_ahead(row->slots + block * kBlockSlots);
    for (int half = 0; half < 2; ++half) {
      const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row->slots + block * kBlockSlots + half * 8));
      for (int run = 0; run < kSlotValues<T>; ++run) {
        const int64_t i = block * kSlotValues<T> + run;
        const uint32_t word = wide ? row->codes[2 * i + half] : row->codes[i] >> (16 * half);
        const __m256i positions = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), shifts), code);
        const auto* groups = reinterpret_cast<const __m256i*>(factors.group_columns + i * kBlockSlots + half * 8);
        const __m256i columns = _mm256_add_epi32(positions, _mm256_loadu_si256(groups));
        const __m256 weight = floats_of_slots<T>(stored, run);
        for (int token = 0; token < kTokens; ++token) {
          const __m256 picked = _mm256_i32gather_ps(factors.x + token * factors.x_stride, columns, 4);
          sums[token] = _mm256_fmadd_ps(weight, picked, sums[token]);
        }
      }
    }
  }
  for (int token = 0; token < kTokens; ++token) row->sums[token * packed_rows::kTileRows] = add_up(sums[token]);
}

#endif

using Multiply = void (*)(const Factors&, const Row*);

template <Multiply kOne>
void one_by_one(const Factors& factors, const Row* rows) {
  kOne(factors, rows);
  kOne(factors, rows + 1);
}

template <Multiply kOne>
constexpr ByStreams<Multiply> kOneByOne{kOne, &one_by_one<kOne>};

#if SPARSEKERN_X86

template <class T, int kTokens, bool kWide>
ByStreams<Multiply> choose_multiply_avx512(bool half) {
  if (!half) return kOneByOne<&multiply_any_avx512<T, kTokens, kWide>>;
  constexpr Multiply one = &multiply_half_avx512<T, kTokens, kWide, 1>;
  if constexpr (kTokens > 4)
    return kOneByOne<one>;  // two streams would not fit the registers
  else
    return {one, &multiply_half_avx512<T, kTokens, kWide, 2>};
}

#endif

template <class T, int kTokens>
ByStreams<Multiply> choose_multiply([[maybe_unused]] Isa isa, [[maybe_unused]] int64_t n, [[maybe_unused]] int64_t m) {
#if SPARSEKERN_X86
  if (isa >= Isa::avx512) {
    const bool half = m == 2 * n && (n & (n - 1)) == 0;
    return packed_rows::code_bits(m) == 2 ? choose_multiply_avx512<T, kTokens, false>(half)
                                          : choose_multiply_avx512<T, kTokens, true>(half);
  }
  if (isa >= Isa::avx2) return kOneByOne<&multiply_any_avx2<T, kTokens>>;
#endif
  return kOneByOne<&multiply_any<T, kTokens>>;
}

template <class T>
struct NmWeight {
  int64_t rows, columns;
  const NmRows& packed;
  int64_t stored;  // values stored per row
  int code_bits;
  std::vector<int32_t> group_columns;
  Isa isa = current_isa();             // read once, because it reads the environment
  ByStreams<Multiply> multiply_by[4];  // 1, 2, 4 and 8 tokens

  NmWeight(const NmRows& p, int64_t columns_)
      : rows(p.rows),
        columns(columns_),
        packed(p),
        stored(packed_rows::stored_per_row(columns_, p.n, p.m, sizeof(T))),
        code_bits(static_cast<int>(packed_rows::code_bits(p.m))),
        // The padding of the last block is multiplied by the zeros after the last column of x.
        group_columns(static_cast<size_t>(stored), static_cast<int32_t>(packed_rows::words(columns_) * packed_rows::kWordColumns)) {
    multiply_by[0] = choose_multiply<T, 1>(isa, p.n, p.m);
    multiply_by[1] = choose_multiply<T, 2>(isa, p.n, p.m);
    multiply_by[2] = choose_multiply<T, 4>(isa, p.n, p.m);
    multiply_by[3] = choose_multiply<T, 8>(isa, p.n, p.m);
    auto column = group_columns.begin();
    for (int64_t first = 0; first < columns; first += p.m) column = std::fill_n(column, p.n, static_cast<int32_t>(first));
  }

  int64_t first_tile(int64_t task, int64_t tasks) const { return packed_rows::tiles(rows) * task / tasks; }

  const Slot* slots_of(int64_t row) const { return static_cast<const Slot*>(packed.values) + row * stored / kSlotValues<T>; }
  const uint32_t* codes_of(int64_t row) const { return packed.codes + row * stored * code_bits / 32; }

  int64_t bytes() const { return rows * stored * (static_cast<int64_t>(sizeof(T)) * 8 + code_bits) / 8; }

  Factors factors_of(const float* x, int64_t x_stride) const {
    return {stored / (kBlockSlots * kSlotValues<T>), group_columns.data(), code_bits, packed.n, x, x_stride};
  }

  bool multiply(const int64_t* tiles, int64_t given, const TokenBlock& block, TileSums* sums) const {
    for (int64_t row = 0; row < packed_rows::kTileRows; ++row) {
      Row some_rows[kStreams];
      int64_t some = 0;
      for (; some < given && tiles[some] * packed_rows::kTileRows + row < rows; ++some) {  // only the last tile may be short
        const int64_t i = tiles[some] * packed_rows::kTileRows + row;
        some_rows[some] = {slots_of(i), codes_of(i), &sums[some][0][row]};
      }
      if (some == 0) break;
      Factors factors = factors_of(block.x, block.x_stride);
      for_token_groups(block.tokens, [&](int power) {
        multiply_by[power].of(some)(factors, some_rows);
        factors.x += block.x_stride << power;
        for (int64_t i = 0; i < some; ++i) some_rows[i].sums += packed_rows::kTileRows << power;
        return true;
      });
    }
    return true;
  }

  bool expand(int64_t tile, float* panel) const {
    std::fill_n(panel, columns * kLanes, 0.0f);
    const int64_t first = tile * packed_rows::kTileRows;
#if SPARSEKERN_X86
    if (isa >= Isa::avx512) {
      Row tile_rows[kLanes];
      const int count = static_cast<int>(std::min(packed_rows::kTileRows, rows - first));
      for (int row = 0; row < count; ++row) tile_rows[row] = {slots_of(first + row), codes_of(first + row), nullptr};
      const auto expand_panel = code_bits == 2 ? &expand_panel_avx512<T, false> : &expand_panel_avx512<T, true>;
      return expand_panel(factors_of(nullptr, 0), tile_rows, count, columns / packed.m * packed.n, columns, panel);
    }
#endif
    return for_each_value(
        tile, [=](int64_t row, int64_t column, T value) { panel[column * kLanes + row - first] = to_float(value); });
  }

  bool expand_rows(int64_t tile, T* weight) const {
    const int64_t first = tile * packed_rows::kTileRows, end = std::min(rows, first + packed_rows::kTileRows);
    std::fill_n(weight + first * columns, (end - first) * columns, T{});
    return for_each_value(tile, [=](int64_t row, int64_t column, T value) { weight[row * columns + column] = value; });
  }

  // Calls f(row, column, value) for each value of a tile.
  template <class F>
  bool for_each_value(int64_t tile, const F& f) const {
    const int64_t first = tile * packed_rows::kTileRows, end = std::min(rows, first + packed_rows::kTileRows);
    for (int64_t row = first; row < end; ++row) {
      const T* values = reinterpret_cast<const T*>(slots_of(row));
      const uint32_t* codes = codes_of(row);
      for (int64_t k = 0; k < columns / packed.m * packed.n; ++k) {
        const int64_t column = group_columns[static_cast<size_t>(k)] + position_of(codes, k, code_bits);
        if (column >= columns) return false;
        f(row, column, values[packed_rows::place_of(k, sizeof(T))]);
      }
    }
    return true;
  }
};

template <class T>
bool multiply(
    const NmRows& packed, const void* x, int64_t tokens, int64_t columns, const void* bias, void* y, const Executor& executor) {
  const NmWeight<T> weight(packed, columns);
  const Activations activations(static_cast<const T*>(x), tokens, columns, weight.isa, executor);
  const Output<T> output{static_cast<T*>(y), packed.rows, nullptr, static_cast<const T*>(bias)};
  return packed_product(weight, activations, output, executor);
}

void check_codes(bool sound) {
  if (!sound) throw std::invalid_argument("codes: expected positions below m, got one past the last column");
}

}  // namespace

void nm_linear(
    const void* x, DType dtype, int64_t tokens, int64_t columns, const NmRows& packed, const void* bias, void* y,
    const Executor& executor) {
  check_codes(dispatch_dtype(dtype, [&](auto* type) {
    return multiply<std::remove_pointer_t<decltype(type)>>(packed, x, tokens, columns, bias, y, executor);
  }));
}

void nm_expand(const NmRows& packed, DType dtype, int64_t columns, void* weight, const Executor& executor) {
  check_codes(dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return expand_all(NmWeight<T>(packed, columns), static_cast<T*>(weight), executor);
  }));
}

}  // namespace sparsekern::cpu
