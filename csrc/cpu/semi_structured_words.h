// Packs one row of a 2:4 weight, several metadata words at a time, for semi_structured_pack and semi_structured_prune_pack.
//
// A group is one integer in a register. Its non-zero flags come from one addition that carries into the top bit of every element,
// its code from a table of 16.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "common/semi_structured_group.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace sparsekern::cpu {

constexpr uint8_t kRefused = 0x80;

// The code for each set of flags; `kRefused` if there are more non-zeros than fit.
constexpr std::array<uint8_t, 16> make_codes() {
  std::array<uint8_t, 16> codes{};
  for (unsigned flags = 0; flags < 16; ++flags) {
    codes[flags] = static_cast<uint8_t>(semi_structured::code_of(flags) | (semi_structured::fits(flags) ? 0 : kRefused));
  }
  return codes;
}
constexpr std::array<uint8_t, 16> kCodes = make_codes();

// Packs words [begin, end) of a row; `weight` and `values` point to its first group and first stored value. Returns whether every
// group fitted and no element was NaN.
template <class K>
SPARSEKERN_INLINE bool pack_words(
    const typename K::element* weight, int64_t row, int64_t rows, int64_t begin, int64_t end, typename K::element* values,
    typename K::word* meta) {
  using Group = typename K::group;
  constexpr semi_structured::Format format = K::format;
  Group nan = 0;
  unsigned seen = 0;
  for (int64_t word = begin; word < end; ++word) {
    uint32_t codes = 0;
    for (int i = 0; i < format.codes_per_word(); ++i) {
      Group group;
      std::memcpy(&group, weight, sizeof group);
      nan |= semi_structured::nan_bits<K>(group);
      const unsigned code = kCodes[semi_structured::flags_of<K>(semi_structured::nonzero_bits<K>(group))];
      seen |= code;
      codes |= (code & 15u) << (4 * i);
      const auto stored = semi_structured::stored_of<K>(group, code & 15u);
      std::memcpy(values, &stored, sizeof stored);
      weight += format.group;
      values += format.group / 2;
    }
    meta[semi_structured::word_offset(row, word, rows, format.row_multiple)] = static_cast<typename K::word>(codes);
  }
  return nan == 0 && (seen & kRefused) == 0;
}

// Calls f(row, begin, end) for all words [0, words) of all rows, in parallel, kTileWords of a row at a time. A block of rows,
// within which metadata words are permuted, is one task, so that no two tasks write to the same word.
template <class K, class F>
void for_row_tiles(const Executor& executor, int64_t rows, int64_t words, const F& f) {
  constexpr int64_t block = K::format.row_multiple;
  const int64_t weights = block * words * K::format.columns_per_word();
  parallel_for(executor, rows / block, 1 + 16384 / (weights + 1), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * block; first < end * block; first += block) {
      for (int64_t word = 0; word < words; word += semi_structured::kTileWords) {
        for (int64_t row = first; row < first + block; ++row) f(row, word, std::min(word + semi_structured::kTileWords, words));
      }
    }
  });
}

}  // namespace sparsekern::cpu
