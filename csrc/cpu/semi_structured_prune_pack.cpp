// semi_structured_prune_pack: select, zero and pack a weight in one pass.
//
// Floor: one read of the weight and of the scores, one write of half the weight and of the metadata. A few words of a row at a time
// are ranked (cpu/rank_groups.h), copied without the dropped weights, and packed (cpu/semi_structured_words.h), all within L1.
#include <atomic>
#include <type_traits>

#include "common/semi_structured_group.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/load_keys.h"
#include "cpu/rank_groups.h"
#include "cpu/semi_structured_words.h"

namespace sparsekern::cpu {

namespace {

template <class T>
using KindOf = std::conditional_t<
    std::is_same_v<T, float>, semi_structured::F32,
    std::conditional_t<std::is_same_v<T, Half>, semi_structured::F16, semi_structured::Bf16>>;

SPARSEKERN_INLINE void take_magnitudes(int32_t* keys, int64_t count) {
  for (int64_t i = 0; i < count; ++i) keys[i] = keys[i] < 0 ? -keys[i] : keys[i];
}

template <class Element>
SPARSEKERN_INLINE void copy_kept(const Element* weight, const uint8_t* mask, int64_t count, Element* kept) {
  for (int64_t i = 0; i < count; ++i) kept[i] = mask[i] ? weight[i] : Element{0};
}

// Null `scores` stand for the magnitudes of the weight.
template <class T, class Score>
void prune_pack(
    const void* weight, const Score* scores, int64_t rows, int64_t columns, void* values, void* meta, const Executor& executor) {
  using K = KindOf<T>;
  using Element = typename K::element;
  constexpr int64_t columns_per_word = K::format.columns_per_word();
  constexpr int64_t most = semi_structured::kTileWords * columns_per_word;
  const auto load_weight = Entries<&load_keys<T>>::choose();
  const auto load_scores = Entries<&load_keys<Score>>::choose();
  const auto to_magnitudes = Entries<&take_magnitudes>::choose();
  const auto copy = Entries<&copy_kept<Element>>::choose();
  const auto pack_some = Entries<&pack_words<K>>::choose();
  const Ranker rank = choose_ranker(K::format.group);
  std::atomic<bool> weight_ordered{true}, scores_ordered{true};
  for_row_tiles<K>(executor, rows, columns / columns_per_word, [&](int64_t row, int64_t begin, int64_t end) {
    const int64_t first = row * columns + begin * columns_per_word;
    const int64_t count = (end - begin) * columns_per_word;
    int32_t keys[most];
    uint8_t mask[most];
    Element kept[most];
    if (load_weight(static_cast<const T*>(weight) + first, count, keys)) weight_ordered = false;
    if (scores == nullptr) {
      to_magnitudes(keys, count);
    } else if (load_scores(scores + first, count, keys)) {
      scores_ordered = false;
    }
    rank(keys, count / K::format.group, K::format.group / 2, K::format.group, mask);
    copy(static_cast<const Element*>(weight) + first, mask, count, kept);
    pack_some(kept, row, rows, begin, end, static_cast<Element*>(values) + first / 2, static_cast<typename K::word*>(meta));
  });
  if (!weight_ordered) refuse_nan("weight", static_cast<const T*>(weight), rows, columns);
  if (!scores_ordered) refuse_nan("scores", scores, rows, columns);
}

}  // namespace

void semi_structured_prune_pack(
    const void* weight, DType dtype, const void* scores, DType scores_dtype, int64_t rows, int64_t columns, void* values,
    void* meta, const Executor& executor) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_dtype(scores_dtype, [&](auto* score_type) {
      using Score = std::remove_pointer_t<decltype(score_type)>;
      prune_pack<T>(weight, static_cast<const Score*>(scores), rows, columns, values, meta, executor);
    });
  });
}

}  // namespace sparsekern::cpu
