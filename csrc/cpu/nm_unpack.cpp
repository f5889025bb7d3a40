// nm_unpack: the dense weight of what nm_pack packed. A group is put together in one register and stored whole.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/nm_layout.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace sparsekern::cpu {

namespace {

// Bit `code` is set where packing can write that code.
constexpr unsigned valid_codes(int group) {
  unsigned valid = 0;
  for (unsigned code = 0; code < 16; ++code) valid |= static_cast<unsigned>(nm::is_code(code, group)) << code;
  return valid;
}

// Unpacks words [begin, end) of a row. Returns whether every code was one that packing writes.
template <class Element, class Group, class Word>
SPARSEKERN_INLINE bool unpack_words(
    const Element* values, const Word* meta, int64_t row, int64_t rows, int64_t begin, int64_t end, Element* weight) {
  constexpr nm::Format format = nm::format_of(sizeof(Element));
  constexpr unsigned valid = valid_codes(format.group);
  constexpr unsigned bits = 8 * sizeof(Element);
  unsigned all_valid = 1;
  values += begin * format.columns_per_word() / 2;
  weight += begin * format.columns_per_word();
  for (int64_t word = begin; word < end; ++word) {
    uint32_t codes = meta[nm::word_offset(row, word, rows, format.row_multiple)];
    for (int i = 0; i < format.codes_per_word(); ++i, codes >>= 4) {
      const unsigned code = codes & 15u;
      all_valid &= valid >> code;
      Group group;
      if constexpr (format.group == 4) {
        group = static_cast<Group>(values[0]) << (nm::first_position(code) * bits) |
            static_cast<Group>(values[1]) << (nm::second_position(code) * bits);
      } else {
        group = static_cast<Group>(values[0]) << (nm::first_position(code) / 2 * bits);
      }
      std::memcpy(weight, &group, sizeof group);
      weight += format.group;
      values += format.group / 2;
    }
  }
  return all_valid != 0;
}

template <class Element, class Word>
void refuse(const Word* meta, int64_t rows, int64_t words) {
  constexpr nm::Format format = nm::format_of(sizeof(Element));
  for (int64_t i = 0; i < rows * words * format.codes_per_word(); ++i) {
    const int64_t group = i % (words * format.codes_per_word());
    const int64_t row = i / (words * format.codes_per_word());
    const uint32_t word = meta[nm::word_offset(row, group / format.codes_per_word(), rows, format.row_multiple)];
    const unsigned code = word >> (group % format.codes_per_word() * 4) & 15u;
    if (nm::is_code(code, format.group)) continue;
    std::string digits = "0b0000";
    for (int bit = 0; bit < 4; ++bit) digits[5 - bit] = static_cast<char>('0' + (code >> bit & 1u));
    throw std::invalid_argument(
        "meta: expected the code of two ascending positions, got " + digits + " for row " + std::to_string(row) + ", columns " +
        std::to_string(group * format.group) + " to " + std::to_string((group + 1) * format.group - 1));
  }
}

template <class Element, class Group, class Word>
void unpack(const void* values, const void* meta, int64_t rows, int64_t columns, void* weight, const Executor& executor) {
  constexpr nm::Format format = nm::format_of(sizeof(Element));
  const auto unpack_some = Entries<&unpack_words<Element, Group, Word>>::choose();
  const int64_t words = columns / format.columns_per_word();
  const auto* stored = static_cast<const Element*>(values);
  const auto* codes = static_cast<const Word*>(meta);
  constexpr int64_t block = format.row_multiple;
  std::atomic<bool> valid{true};
  const auto unpack_tile = [&](int64_t first_row, int64_t begin, int64_t end) {
    for (int64_t row = first_row; row < first_row + block; ++row) {
      Element* out = static_cast<Element*>(weight) + row * columns;
      if (!unpack_some(stored + row * (columns / 2), codes, row, rows, begin, end, out)) valid = false;
    }
  };
  parallel_for(executor, rows / block, 1 + 16384 / (block * columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * block; row < end * block; row += block) {
      for (int64_t word = 0; word < words; word += nm::kTileWords) unpack_tile(row, word, std::min(word + nm::kTileWords, words));
    }
  });
  if (!valid) refuse<Element>(codes, rows, words);
}

}  // namespace

void nm_unpack(
    const void* values,
    const void* meta,
    int element_size,
    int64_t rows,
    int64_t columns,
    void* weight,
    const Executor& executor) {
  switch (element_size) {
    case 1: return unpack<uint8_t, uint32_t, uint32_t>(values, meta, rows, columns, weight, executor);
    case 2: return unpack<uint16_t, uint64_t, uint16_t>(values, meta, rows, columns, weight, executor);
    default: return unpack<uint32_t, uint64_t, uint16_t>(values, meta, rows, columns, weight, executor);
  }
}

}  // namespace sparsekern::cpu
