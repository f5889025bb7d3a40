// Selects exactly the k largest of a whole matrix, which is too large to be counted 32 times. Histograms over 16 bits of the key
// find the k-th largest in one pass (16-bit keys) or two (32-bit keys); one more pass marks the kept elements.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kth_largest.h"
#include "cpu/parallel.h"

namespace sparsekern::cpu {

constexpr int64_t kSelectionChunk = 4096;  // keys that stay in L1

// `Source` provides the keys:
//   kKeyBits                        16 or 32
//   unsigned_key(int32_t)           the key shifted to start at zero; signed_key undoes it
//   bool load(begin, count, keys)   writes the keys from index `begin` on; true if a value has no order. Called first, once per
//   index.
//   reload(begin, count, keys)      writes the same keys again
template <class Source>
class MatrixSelection {
 public:
  MatrixSelection(Source& source, int64_t count, int64_t k, const Executor& executor)
      : source_(source), count_(count), k_(k), chunks_((count + kSelectionChunk - 1) / kSelectionChunk), executor_(executor) {}

  // Calls write(begin, count, mask) once for every chunk, in any order. The mask has a byte per key, 1 for the k largest; of equal
  // keys, those with the lowest index. Returns false, without a call, if a value has no order.
  template <class Write>
  bool run(const Write& write) {
    std::vector<int64_t> digits = high_digits();
    if (!ordered_) return false;
    if (k_ == count_) return mark({std::numeric_limits<int32_t>::min(), 0}, write);
    if (k_ == 0) return mark({std::numeric_limits<int32_t>::max(), 0}, write);
    const int32_t key = Source::signed_key(find_threshold(std::move(digits)));
    return mark({key, needed_ == equal_ ? count_ : find_ties_end(key)}, write);
  }

 private:
  static constexpr int64_t kDigits = 1 << 16;
  static constexpr int kHighShift = Source::kKeyBits - 16;

  int64_t length_of(int64_t chunk) const { return std::min(kSelectionChunk, count_ - chunk * kSelectionChunk); }

  // Sums the histograms that `count` fills for slices of chunks. They are integers, so that the order does not matter.
  template <class F>
  std::vector<int64_t> histogram(const F& count) {
    const int64_t slices = std::min<int64_t>(chunks_, executor_.threads);
    std::vector<std::vector<int64_t>> partial(static_cast<size_t>(slices));
    parallel_tasks(executor_, slices, [&](int64_t slice) {
      std::vector<int64_t>& own = partial[static_cast<size_t>(slice)];
      own.assign(kDigits, 0);
      int32_t keys[kSelectionChunk];
      for (int64_t chunk = chunks_ * slice / slices; chunk < chunks_ * (slice + 1) / slices; ++chunk) {
        count(chunk * kSelectionChunk, length_of(chunk), keys, own.data());
      }
    });
    std::vector<int64_t> sum(kDigits, 0);
    for (const auto& own : partial) {
      for (int64_t digit = 0; digit < kDigits; ++digit) sum[static_cast<size_t>(digit)] += own[static_cast<size_t>(digit)];
    }
    return sum;
  }

  std::vector<int64_t> high_digits() {
    return histogram([&](int64_t begin, int64_t length, int32_t* keys, int64_t* digits) {
      if (source_.load(begin, length, keys)) ordered_ = false;
      for (int64_t i = 0; i < length; ++i) ++digits[Source::unsigned_key(keys[i]) >> kHighShift & 0xffffu];
    });
  }

  // Returns the k-th largest unsigned key. Afterwards `needed_` of the `equal_` keys equal to it are to be kept.
  uint32_t find_threshold(std::vector<int64_t> digits) {
    needed_ = k_;
    const uint32_t high = descend(digits);
    if constexpr (kHighShift == 0) return high;
    const uint32_t low = descend(histogram([&](int64_t begin, int64_t length, int32_t* keys, int64_t* low_digits) {
      source_.reload(begin, length, keys);
      for (int64_t i = 0; i < length; ++i) {
        const uint32_t key = Source::unsigned_key(keys[i]);
        if (key >> 16 == high) ++low_digits[key & 0xffffu];
      }
    }));
    return high << 16 | low;
  }

  // Returns the digit at which `needed_` runs out, counting from the largest; `needed_` becomes the remainder for that digit.
  uint32_t descend(const std::vector<int64_t>& digits) {
    uint32_t digit = kDigits - 1;
    for (; digits[digit] < needed_; --digit) needed_ -= digits[digit];
    equal_ = digits[digit];
    return digit;
  }

  template <class Write>
  bool mark(Cut cut, const Write& write) {
    const auto mark_chunk = Entries<&write_mask>::choose();
    parallel_for(executor_, chunks_, 4, [&](int64_t first, int64_t last) {
      int32_t keys[kSelectionChunk];
      uint8_t mask[kSelectionChunk];
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t begin = chunk * kSelectionChunk;
        source_.reload(begin, length_of(chunk), keys);
        mark_chunk(keys, length_of(chunk), {cut.key, cut.ties_end - begin}, mask);
        write(begin, length_of(chunk), mask);
      }
    });
    return true;
  }

  int64_t find_ties_end(int32_t key) {
    const auto count_ties = Entries<&count_equal>::choose();
    std::vector<int64_t> ties(static_cast<size_t>(chunks_));
    int32_t keys[kSelectionChunk];
    parallel_for(executor_, chunks_, 4, [&](int64_t first, int64_t last) {
      int32_t own_keys[kSelectionChunk];
      for (int64_t chunk = first; chunk < last; ++chunk) {
        source_.reload(chunk * kSelectionChunk, length_of(chunk), own_keys);
        ties[static_cast<size_t>(chunk)] = count_ties(own_keys, length_of(chunk), key);
      }
    });
    int64_t chunk = 0;
    int64_t needed = needed_;
    for (; ties[static_cast<size_t>(chunk)] < needed; ++chunk) needed -= ties[static_cast<size_t>(chunk)];
    source_.reload(chunk * kSelectionChunk, length_of(chunk), keys);
    return chunk * kSelectionChunk + end_of_ties(keys, length_of(chunk), key, needed);
  }

  Source& source_;
  int64_t count_;
  int64_t k_;
  int64_t chunks_;
  const Executor& executor_;
  std::atomic<bool> ordered_{true};
  int64_t needed_ = 0;
  int64_t equal_ = 0;
};

}  // namespace sparsekern::cpu
