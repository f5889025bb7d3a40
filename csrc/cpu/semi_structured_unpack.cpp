// semi_structured_unpack: unpacks a weight that semi_structured_pack packed. A group is assembled in one register and stored whole.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/semi_structured_group.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/semi_structured_words.h"

namespace sparsekern::cpu {

namespace {

// Unpacks words [begin, end) of a row; `values` and `weight` point to its first stored value and first group. Returns whether
// packing could have written every code.
template <class K>
SPARSEKERN_INLINE bool unpack_words(
    const typename K::element* values, const typename K::word* meta, int64_t row, int64_t rows, int64_t begin, int64_t end,
    typename K::element* weight) {
  constexpr semi_structured::Format format = K::format;
  constexpr unsigned valid = semi_structured::valid_codes(format.group);
  unsigned all_valid = 1;
  for (int64_t word = begin; word < end; ++word) {
    uint32_t codes = meta[semi_structured::word_offset(row, word, rows, format.row_multiple)];
    for (int i = 0; i < format.codes_per_word(); ++i, codes >>= 4) {
      const unsigned code = codes & 15u;
      all_valid &= valid >> code;
      typename K::stored stored;
      std::memcpy(&stored, values, sizeof stored);
      const auto group = semi_structured::group_of<K>(stored, code);
      std::memcpy(weight, &group, sizeof group);
      weight += format.group;
      values += format.group / 2;
    }
  }
  return all_valid != 0;
}

template <class K>
void refuse(const typename K::word* meta, int64_t rows, int64_t words) {
  constexpr semi_structured::Format format = K::format;
  for (int64_t i = 0; i < rows * words * format.codes_per_word(); ++i) {
    const int64_t group = i % (words * format.codes_per_word());
    const int64_t row = i / (words * format.codes_per_word());
    const uint32_t word = meta[semi_structured::word_offset(row, group / format.codes_per_word(), rows, format.row_multiple)];
    const unsigned code = word >> (group % format.codes_per_word() * 4) & 15u;
    if (semi_structured::is_code(code, format.group)) continue;
    std::string digits = "0b0000";
    for (int bit = 0; bit < 4; ++bit) digits[5 - bit] = static_cast<char>('0' + (code >> bit & 1u));
    throw std::invalid_argument(
        "meta: expected the code of two ascending positions, got " + digits + " for row " + std::to_string(row) + ", columns " +
        std::to_string(group * format.group) + " to " + std::to_string((group + 1) * format.group - 1));
  }
}

template <class K>
void unpack(const void* values, const void* meta, int64_t rows, int64_t columns, void* weight, const Executor& executor) {
  using Element = typename K::element;
  const auto unpack_some = Entries<&unpack_words<K>>::choose();
  constexpr int64_t columns_per_word = K::format.columns_per_word();
  const int64_t words = columns / columns_per_word;
  const auto* codes = static_cast<const typename K::word*>(meta);
  std::atomic<bool> valid{true};
  for_row_tiles<K>(executor, rows, words, [&](int64_t row, int64_t begin, int64_t end) {
    const int64_t first = row * columns + begin * columns_per_word;
    const Element* stored = static_cast<const Element*>(values) + first / 2;
    if (!unpack_some(stored, codes, row, rows, begin, end, static_cast<Element*>(weight) + first)) valid = false;
  });
  if (!valid) refuse<K>(codes, rows, words);
}

}  // namespace

void semi_structured_unpack(
    const void* values, const void* meta, int element_size, int64_t rows, int64_t columns, void* weight, const Executor& executor) {
  switch (element_size) {
    case 1: return unpack<semi_structured::Int8>(values, meta, rows, columns, weight, executor);
    case 2: return unpack<semi_structured::Bf16>(values, meta, rows, columns, weight, executor);
    default: return unpack<semi_structured::F32>(values, meta, rows, columns, weight, executor);
  }
}

}  // namespace sparsekern::cpu
