// nm_pack: a 2:4 weight as values and metadata (common/nm_layout.h).
//
// Floor: one read of the weight and one write of half of it and of the metadata. A group is one integer in a register: its
// non-zero flags come from one addition that carries into the top bit of every element, its code from a table of 16. A block of
// rows whose metadata words are permuted among themselves is one task, so no two tasks write to the same word.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/nm_layout.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace sparsekern::cpu {

namespace {

// What packing must know of an element type: `Group` holds a group, `infinity` is the pattern above which a magnitude is NaN.
template <class Element, class Group, class Word, uint64_t kInfinity>
struct Kind {
  using element = Element;
  using group = Group;
  using word = Word;
  static constexpr nm::Format format = nm::format_of(sizeof(Element));
  static constexpr int bits = 8 * sizeof(Element);
  static constexpr uint64_t infinity = kInfinity;
};
using Int8 = Kind<uint8_t, uint32_t, uint32_t, 0>;
using Bf16 = Kind<uint16_t, uint64_t, uint16_t, 0x7f80>;
using F16 = Kind<uint16_t, uint64_t, uint16_t, 0x7c00>;
using F32 = Kind<uint32_t, uint64_t, uint16_t, 0x7f800000>;

// `pattern` in every element of a group.
template <class K>
constexpr typename K::group everywhere(uint64_t pattern) {
  typename K::group all = 0;
  for (int j = 0; j < K::format.group; ++j) all |= static_cast<typename K::group>(pattern) << (j * K::bits);
  return all;
}

template <class K>
constexpr uint64_t kTop = uint64_t{1} << (K::bits - 1);

// The top bit of each element that is not zero. Adding the largest magnitude carries into it unless the magnitude is zero; an int8
// of -128 has no magnitude bit but is not zero, while a float with only the sign bit is.
template <class K>
SPARSEKERN_INLINE typename K::group nonzero_bits(typename K::group group) {
  constexpr auto magnitudes = everywhere<K>(kTop<K> - 1);
  typename K::group carried = (group & magnitudes) + magnitudes;
  if (K::infinity == 0) carried |= group;
  return carried & everywhere<K>(kTop<K>);
}

template <class K>
SPARSEKERN_INLINE bool has_nan(typename K::group group) {
  if (K::infinity == 0) return false;
  constexpr auto magnitudes = everywhere<K>(kTop<K> - 1);
  return (((group & magnitudes) + everywhere<K>(kTop<K> - 1 - K::infinity)) & everywhere<K>(kTop<K>)) != 0;
}

// The flags as nm::code_of wants them: four bits.
template <class K>
SPARSEKERN_INLINE unsigned flags_of(typename K::group nonzero) {
  unsigned flags = 0;
  for (int j = 0; j < K::format.group; ++j) {
    const auto set = static_cast<unsigned>(nonzero >> (j * K::bits + K::bits - 1)) & 1u;
    flags |= K::format.group == 4 ? set << j : set * 3u << 2 * j;
  }
  return flags;
}

constexpr uint8_t kRefused = 0x80;

// Code by flags; `kRefused` where there are more non-zeros than fit.
constexpr std::array<uint8_t, 16> make_codes() {
  std::array<uint8_t, 16> codes{};
  for (unsigned flags = 0; flags < 16; ++flags) {
    const unsigned count = (flags & 1) + (flags >> 1 & 1) + (flags >> 2 & 1) + (flags >> 3);
    codes[flags] = static_cast<uint8_t>(nm::code_of(flags) | (count > 2 ? kRefused : 0));
  }
  return codes;
}
constexpr std::array<uint8_t, 16> kCodes = make_codes();

// Packs words [begin, end) of a row. Returns whether every group fitted and no element was NaN.
template <class K>
SPARSEKERN_INLINE bool pack_words(
    const typename K::element* weight, int64_t row, int64_t rows, int64_t begin, int64_t end, typename K::element* values,
    typename K::word* meta) {
  using Group = typename K::group;
  constexpr nm::Format format = K::format;
  bool nan = false;
  unsigned seen = 0;
  weight += begin * format.columns_per_word();
  values += begin * format.columns_per_word() / 2;
  for (int64_t word = begin; word < end; ++word) {
    uint32_t codes = 0;
    for (int i = 0; i < format.codes_per_word(); ++i) {
      Group group;
      std::memcpy(&group, weight, sizeof group);
      nan |= has_nan<K>(group);
      const unsigned code = kCodes[flags_of<K>(nonzero_bits<K>(group))];
      seen |= code;
      codes |= (code & 15u) << (4 * i);
      const unsigned first = nm::first_position(code);
      if constexpr (format.group == 4) {
        values[0] = static_cast<typename K::element>(group >> (first * K::bits));
        values[1] = static_cast<typename K::element>(group >> (nm::second_position(code & 15u) * K::bits));
      } else {
        values[0] = static_cast<typename K::element>(group >> (first / 2 * K::bits));
      }
      weight += format.group;
      values += format.group / 2;
    }
    meta[nm::word_offset(row, word, rows, format.row_multiple)] = static_cast<typename K::word>(codes);
  }
  return !nan && (seen & kRefused) == 0;
}

// Throws for the first NaN or, where there is none, for the first group with more non-zeros than fit.
template <class K>
void refuse(const typename K::element* weight, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows * columns; ++i) {
    if (K::infinity != 0 && (weight[i] & (kTop<K> - 1)) > K::infinity) {
      throw std::invalid_argument(
          "weight: expected no NaN, got nan at [" + std::to_string(i / columns) + ", " + std::to_string(i % columns) + "]");
    }
  }
  constexpr int size = K::format.group;
  for (int64_t i = 0; i < rows * columns; i += size) {
    int count = 0;
    for (int j = 0; j < size; ++j) {
      count += K::infinity == 0 ? weight[i + j] != 0 : (weight[i + j] & (kTop<K> - 1)) != 0;
    }
    if (count <= size / 2) continue;
    const int64_t column = i % columns;
    throw std::invalid_argument(
        "weight: expected at most " + std::to_string(size / 2) + " non-zeros in every " + std::to_string(size) + " columns, got " +
        std::to_string(count) + " in row " + std::to_string(i / columns) + ", columns " + std::to_string(column) + " to " +
        std::to_string(column + size - 1));
  }
}

template <class K>
void pack(const void* weight, int64_t rows, int64_t columns, void* values, void* meta, const Executor& executor) {
  using Element = typename K::element;
  const auto pack_some = Entries<&pack_words<K>>::choose();
  const auto* source = static_cast<const Element*>(weight);
  const int64_t words = columns / K::format.columns_per_word();
  constexpr int64_t block = K::format.row_multiple;
  std::atomic<bool> fits{true};
  const auto pack_tile = [&](int64_t first_row, int64_t begin, int64_t end) {
    for (int64_t row = first_row; row < first_row + block; ++row) {
      auto* row_values = static_cast<Element*>(values) + row * (columns / 2);
      if (!pack_some(source + row * columns, row, rows, begin, end, row_values, static_cast<typename K::word*>(meta))) fits = false;
    }
  };
  parallel_for(executor, rows / block, 1 + 16384 / (block * columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * block; row < end * block; row += block) {
      for (int64_t word = 0; word < words; word += nm::kTileWords) pack_tile(row, word, std::min(word + nm::kTileWords, words));
    }
  });
  if (!fits) refuse<K>(source, rows, columns);
}

}  // namespace

void nm_pack(
    const void* weight,
    NmType type,
    int64_t rows,
    int64_t columns,
    void* values,
    void* meta,
    const Executor& executor) {
  switch (type) {
    case NmType::i8: return pack<Int8>(weight, rows, columns, values, meta, executor);
    case NmType::bf16: return pack<Bf16>(weight, rows, columns, values, meta, executor);
    case NmType::f16: return pack<F16>(weight, rows, columns, values, meta, executor);
    case NmType::f32: return pack<F32>(weight, rows, columns, values, meta, executor);
  }
}

}  // namespace sparsekern::cpu
