// topk_mask: keeps exactly k, without sorting.
//
// Floor: one read of the scores and one write of the mask. A row is turned into integer keys once, in cache. Its k-th largest key
// is then found by bisection over the keys' range; each step is a vectorised count. Distinct scores need about as many steps as it
// takes to separate neighbours (about 15 for 4096), and no input takes more than 32. cpu/matrix_selection.h handles a whole matrix.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/kth_largest.h"
#include "cpu/load_keys.h"
#include "cpu/matrix_selection.h"

namespace sparsekern::cpu {

namespace {

template <class T>
SPARSEKERN_INLINE bool select_row(const T* scores, int64_t columns, int64_t k, int32_t* keys, uint8_t* mask) {
  if (load_keys(scores, columns, keys)) return false;
  const bool all_or_none = k == 0 || k == columns;
  if (all_or_none) {
    std::fill_n(mask, columns, static_cast<uint8_t>(k != 0));
  } else {
    write_mask(keys, columns, kth_largest(keys, columns, k), mask);
  }
  return true;
}

template <class T>
bool select_rows(const T* scores, int64_t rows, int64_t columns, int64_t k, uint8_t* mask, const Executor& executor) {
  const auto select = Entries<&select_row<T>>::choose();
  std::atomic<bool> ordered{true};
  const int64_t grain = 1 + 16384 / (columns + 1);
  parallel_for(executor, rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> keys(static_cast<size_t>(columns));
    for (int64_t row = begin; row < end; ++row) {
      if (!select(scores + row * columns, columns, k, keys.data(), mask + row * columns)) ordered = false;
    }
  });
  return ordered;
}

// The keys of a matrix as one long row: 32 bits for float32, 16 for 16-bit dtypes.
template <class T>
class ScoreKeys {
 public:
  static constexpr int kKeyBits = 8 * sizeof(T);
  static uint32_t unsigned_key(int32_t key) { return static_cast<uint32_t>(key) + kOffset; }
  static int32_t signed_key(uint32_t key) { return static_cast<int32_t>(key - kOffset); }

  explicit ScoreKeys(const T* scores) : scores_(scores) {}
  bool load(int64_t begin, int64_t count, int32_t* keys) const { return load_(scores_ + begin, count, keys); }
  void reload(int64_t begin, int64_t count, int32_t* keys) const { load_(scores_ + begin, count, keys); }

 private:
  static constexpr uint32_t kOffset = 1u << (kKeyBits - 1);

  const T* scores_;
  typename Entries<&load_keys<T>>::Function load_ = Entries<&load_keys<T>>::choose();
};

template <class T>
bool select_matrix(const T* scores, int64_t count, int64_t k, uint8_t* mask, const Executor& executor) {
  ScoreKeys<T> keys(scores);
  return MatrixSelection<ScoreKeys<T>>(keys, count, k, executor).run([mask](int64_t begin, int64_t length, const uint8_t* kept) {
    std::copy_n(kept, length, mask + begin);
  });
}

}  // namespace

void topk_mask(
    const void* scores, DType dtype, int64_t rows, int64_t columns, int64_t k, bool whole_matrix, uint8_t* mask,
    const Executor& executor) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* values = static_cast<const T*>(scores);
    const bool ordered = whole_matrix ? select_matrix(values, rows * columns, k, mask, executor)
                                      : select_rows(values, rows, columns, k, mask, executor);
    if (!ordered) refuse_nan("scores", values, rows, columns);
  });
}

}  // namespace sparsekern::cpu
