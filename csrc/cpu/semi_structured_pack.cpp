// semi_structured_pack: packs a 2:4 weight as values and metadata (common/semi_structured.h).
//
// Floor: one read of the weight and one write of half of it and of the metadata. cpu/semi_structured_words.h packs a row.
#include <atomic>
#include <stdexcept>
#include <string>

#include "common/semi_structured_group.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/semi_structured_words.h"

namespace sparsekern::cpu {

namespace {

// Throws for the first NaN or, if there is none, for the first group with more non-zeros than fit.
template <class K>
void refuse(const typename K::element* weight, int64_t rows, int64_t columns) {
  constexpr uint64_t magnitude = semi_structured::kTop<K> - 1;
  for (int64_t i = 0; i < rows * columns; ++i) {
    if (K::infinity != 0 && (weight[i] & magnitude) > K::infinity) {
      throw std::invalid_argument(
          "weight: expected no NaN, got nan at [" + std::to_string(i / columns) + ", " + std::to_string(i % columns) + "]");
    }
  }
  constexpr int size = K::format.group;
  for (int64_t i = 0; i < rows * columns; i += size) {
    int count = 0;
    for (int j = 0; j < size; ++j) {
      count += K::infinity == 0 ? weight[i + j] != 0 : (weight[i + j] & magnitude) != 0;
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
  constexpr int64_t columns_per_word = K::format.columns_per_word();
  std::atomic<bool> fits{true};
  for_row_tiles<K>(executor, rows, columns / columns_per_word, [&](int64_t row, int64_t begin, int64_t end) {
    const int64_t first = row * columns + begin * columns_per_word;
    Element* stored = static_cast<Element*>(values) + first / 2;
    if (!pack_some(source + first, row, rows, begin, end, stored, static_cast<typename K::word*>(meta))) fits = false;
  });
  if (!fits) refuse<K>(source, rows, columns);
}

}  // namespace

void semi_structured_pack(
    const void* weight, semi_structured::Type type, int64_t rows, int64_t columns, void* values, void* meta,
    const Executor& executor) {
  semi_structured::dispatch_type(type, [&](auto kind) { pack<decltype(kind)>(weight, rows, columns, values, meta, executor); });
}

}  // namespace sparsekern::cpu
