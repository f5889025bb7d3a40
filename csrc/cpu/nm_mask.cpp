// nm_mask: the N largest of every M consecutive scores.
//
// Floor: one read of the scores and one write of the mask. cpu/rank_groups.h describes the ranking.
#include <algorithm>
#include <atomic>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/load_keys.h"
#include "cpu/rank_groups.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kChunkKeys = 4096;  // 16 KiB: the keys of a task's chunk stay in L1

template <class T>
bool select_groups(const T* scores, int64_t groups, int64_t n, int64_t m, uint8_t* mask, const Executor& executor) {
  const auto load = Entries<&load_keys<T>>::choose();
  const Ranker rank = choose_ranker(m);
  const int64_t chunk = kChunkKeys / m;
  std::atomic<bool> ordered{true};
  parallel_for(executor, groups, 4 * chunk, [&](int64_t begin, int64_t end) {
    int32_t keys[kChunkKeys];
    for (int64_t group = begin; group < end; group += chunk) {
      const int64_t count = std::min(chunk, end - group);
      if (load(scores + group * m, count * m, keys)) ordered = false;
      rank(keys, count, n, m, mask + group * m);
    }
  });
  return ordered;
}

}  // namespace

void nm_mask(
    const void* scores, DType dtype, int64_t rows, int64_t columns, int64_t n, int64_t m, uint8_t* mask, const Executor& executor) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* values = static_cast<const T*>(scores);
    if (!select_groups(values, rows * (columns / m), n, m, mask, executor)) refuse_nan("scores", values, rows, columns);
  });
}

}  // namespace sparsekern::cpu
