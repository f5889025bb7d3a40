// topk_mask: exactly k kept, without sorting.
//
// Floor: one read of the scores and one write of the mask. A row is turned into integer keys once, in cache; its k-th largest key
// is then found by bisection over the keys' range, each step a vectorised count. Distinct scores part after about as many steps as
// it takes to separate neighbours (some 15 of 4096), and no input takes more than 32. A matrix is too large to be counted 32 times:
// there, histograms over 16 bits of the key find it in one pass (half dtypes) or two (float32).
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/kth_largest.h"
#include "cpu/load_keys.h"

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

// The matrix as one long row, cut into chunks whose keys stay in L1.
constexpr int64_t kChunk = 4096;
constexpr int64_t kDigits = 1 << 16;

// Keys shifted to start at zero: two 16-bit digits for float32, one for the half dtypes.
SPARSEKERN_INLINE uint32_t unsigned_key(int32_t key, float) { return static_cast<uint32_t>(key) ^ 0x80000000u; }
SPARSEKERN_INLINE uint32_t unsigned_key(int32_t key, BFloat16) { return static_cast<uint32_t>(key + 0x8000); }
SPARSEKERN_INLINE uint32_t unsigned_key(int32_t key, Half) { return static_cast<uint32_t>(key + 0x8000); }

template <class T>
class MatrixSelection {
 public:
  MatrixSelection(const T* scores, int64_t count, int64_t k, const Executor& executor)
      : scores_(scores), count_(count), k_(k), chunks_((count + kChunk - 1) / kChunk), executor_(executor) {}

  bool run(uint8_t* mask) {
    std::vector<int64_t> histogram = high_histogram();
    if (!ordered_) return false;
    const bool all_or_none = k_ == 0 || k_ == count_;
    if (all_or_none) {
      std::fill_n(mask, count_, static_cast<uint8_t>(k_ != 0));
      return true;
    }
    const uint32_t threshold = find_threshold(std::move(histogram));
    write(static_cast<int32_t>(threshold - unsigned_key(0, T{})), mask);
    return true;
  }

 private:
  // Sums, over slices of chunks, of what `count` adds to a slice's own histogram: integers, so the order does not matter.
  template <class F>
  std::vector<int64_t> histogram(const F& count) {
    const int64_t slices = std::min<int64_t>(chunks_, executor_.threads);
    std::vector<std::vector<int64_t>> partial(static_cast<size_t>(slices));
    parallel_tasks(executor_, slices, [&](int64_t slice) {
      std::vector<int64_t>& own = partial[static_cast<size_t>(slice)];
      own.assign(kDigits, 0);
      std::vector<int32_t> keys(kChunk);
      for (int64_t chunk = chunks_ * slice / slices; chunk < chunks_ * (slice + 1) / slices; ++chunk) {
        count(keys.data(), load(chunk, keys.data()), own.data());
      }
    });
    std::vector<int64_t> sum(kDigits, 0);
    for (const auto& own : partial) {
      for (int64_t digit = 0; digit < kDigits; ++digit) sum[static_cast<size_t>(digit)] += own[static_cast<size_t>(digit)];
    }
    return sum;
  }

  int64_t load(int64_t chunk, int32_t* keys) {
    const int64_t length = std::min(kChunk, count_ - chunk * kChunk);
    if (load_(scores_ + chunk * kChunk, length, keys)) ordered_ = false;
    return length;
  }

  std::vector<int64_t> high_histogram() {
    return histogram([](const int32_t* keys, int64_t length, int64_t* digits) {
      for (int64_t i = 0; i < length; ++i) ++digits[unsigned_key(keys[i], T{}) >> kHighShift & 0xffffu];
    });
  }

  // The k-th largest unsigned key. Afterwards `needed_` of the `equal_` keys like it are to be kept.
  uint32_t find_threshold(std::vector<int64_t> high_digits) {
    needed_ = k_;
    const uint32_t high = descend(high_digits);
    if constexpr (kHighShift == 0) return high;
    const uint32_t low = descend(histogram([high](const int32_t* keys, int64_t length, int64_t* digits) {
      for (int64_t i = 0; i < length; ++i) {
        const uint32_t key = unsigned_key(keys[i], T{});
        if (key >> 16 == high) ++digits[key & 0xffffu];
      }
    }));
    return high << 16 | low;
  }

  // The digit at which `needed_` runs out, counting from the largest; `needed_` becomes what is left for that digit.
  uint32_t descend(const std::vector<int64_t>& digits) {
    uint32_t digit = kDigits - 1;
    for (; digits[digit] < needed_; --digit) needed_ -= digits[digit];
    equal_ = digits[digit];
    return digit;
  }

  void write(int32_t key, uint8_t* mask) {
    const int64_t ties_end = needed_ == equal_ ? count_ : find_ties_end(key);
    const auto write_chunk = Entries<&write_mask>::choose();
    parallel_for(executor_, chunks_, 4, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> keys(kChunk);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t length = load(chunk, keys.data());
        write_chunk(keys.data(), length, {key, ties_end - chunk * kChunk}, mask + chunk * kChunk);
      }
    });
  }

  int64_t find_ties_end(int32_t key) {
    const auto count_ties = Entries<&count_equal>::choose();
    std::vector<int64_t> ties(static_cast<size_t>(chunks_));
    parallel_for(executor_, chunks_, 4, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> keys(kChunk);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        ties[static_cast<size_t>(chunk)] = count_ties(keys.data(), load(chunk, keys.data()), key);
      }
    });
    int64_t chunk = 0;
    int64_t needed = needed_;
    for (; ties[static_cast<size_t>(chunk)] < needed; ++chunk) needed -= ties[static_cast<size_t>(chunk)];
    std::vector<int32_t> keys(kChunk);
    return chunk * kChunk + end_of_ties(keys.data(), load(chunk, keys.data()), key, needed);
  }

  static constexpr int kHighShift = sizeof(T) == 4 ? 16 : 0;

  const T* scores_;
  int64_t count_;
  int64_t k_;
  int64_t chunks_;
  const Executor& executor_;
  typename Entries<&load_keys<T>>::Function load_ = Entries<&load_keys<T>>::choose();
  std::atomic<bool> ordered_{true};
  int64_t needed_ = 0;
  int64_t equal_ = 0;
};

}  // namespace

void topk_mask(
    const void* scores,
    DType dtype,
    int64_t rows,
    int64_t columns,
    int64_t k,
    bool whole_matrix,
    uint8_t* mask,
    const Executor& executor) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* values = static_cast<const T*>(scores);
    const bool ordered = whole_matrix ? MatrixSelection<T>(values, rows * columns, k, executor).run(mask)
                                      : select_rows(values, rows, columns, k, mask, executor);
    if (!ordered) refuse_nan("scores", values, rows, columns);
  });
}

}  // namespace sparsekern::cpu
