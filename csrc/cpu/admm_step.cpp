// admm_step_: z = weight + offset + dual; the largest |z| are kept, the others become the new dual; offset = kept - dual - weight.
//
// Floor: one read of offset, dual, weight and mask and one write of all but weight, 26 bytes an element. N:M groups and rows reach
// it: a chunk is processed in cache. For a whole matrix z is first stored in place of the dual. Its threshold is found by radix
// selection (cpu/matrix_selection.h), which reads z twice more.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "common/dtype.h"
#include "cpu/dispatch.h"
#include "cpu/finite.h"
#include "cpu/kernels.h"
#include "cpu/kth_largest.h"
#include "cpu/matrix_selection.h"
#include "cpu/rank_groups.h"

namespace sparsekern::cpu {

namespace {

// The bits of finite magnitudes order like the floats; from this value on they are Inf or NaN.
constexpr int32_t kInfinity = 0x7f800000;

SPARSEKERN_INLINE int32_t magnitude(float value) { return static_cast<int32_t>(float_to_bits(value) & 0x7fffffffu); }

// Stores z in place of the dual, and the keys of |z|. Returns whether a z is not finite.
SPARSEKERN_INLINE bool load_step(const float* offset, const float* weight, float* dual, int64_t count, int32_t* keys) {
  int32_t highest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float z = weight[i] + offset[i] + dual[i];
    dual[i] = z;
    keys[i] = magnitude(z);
    highest = keys[i] > highest ? keys[i] : highest;
  }
  return highest >= kInfinity;
}

SPARSEKERN_INLINE void load_magnitudes(const float* z, int64_t count, int32_t* keys) {
  for (int64_t i = 0; i < count; ++i) keys[i] = magnitude(z[i]);
}

// Takes the step; `dual` holds z on entry. Returns the number of changed entries of the mask.
SPARSEKERN_INLINE int64_t
finish_step(const uint8_t* kept, const float* weight, int64_t count, float* offset, float* dual, uint8_t* mask) {
  int32_t changed = 0;  // wide enough: a chunk is shorter than 2^31
  for (int64_t i = 0; i < count; ++i) {
    const float z = dual[i];
    const bool keep = kept[i] != 0;
    offset[i] = (keep ? z : 0.0f - z) - weight[i];
    dual[i] = keep ? 0.0f : z;
    changed += kept[i] != mask[i];
    mask[i] = kept[i];
  }
  return changed;
}

class Step {
 public:
  static constexpr int kKeyBits = 32;
  static uint32_t unsigned_key(int32_t key) { return static_cast<uint32_t>(key); }
  static int32_t signed_key(uint32_t key) { return static_cast<int32_t>(key); }

  Step(float* offset, float* dual, uint8_t* mask, const float* weight)
      : offset_(offset), dual_(dual), mask_(mask), weight_(weight) {}

  bool load(int64_t begin, int64_t count, int32_t* keys) {
    if (!load_(offset_ + begin, weight_ + begin, dual_ + begin, count, keys)) return false;
    int64_t first = refused_;
    while (begin < first && !refused_.compare_exchange_weak(first, begin)) {
    }
    return true;
  }
  void reload(int64_t begin, int64_t count, int32_t* keys) const { reload_(dual_ + begin, count, keys); }
  void finish(int64_t begin, int64_t count, const uint8_t* kept) {
    changed_ += finish_(kept, weight_ + begin, count, offset_ + begin, dual_ + begin, mask_ + begin);
  }
  int64_t changed() const { return changed_; }

  // Throws for the first z that is not finite, if there is one. Chunks that hold one were not finished: only their dual is lost.
  void require_finite(int64_t columns) const {
    if (refused_ == kNone) return;
    int64_t i = refused_;
    while (std::isfinite(dual_[i])) ++i;
    const bool in_offset = !std::isfinite(offset_[i]), in_weight = !in_offset && !std::isfinite(weight_[i]);
    refuse_nonfinite(
        in_offset   ? "offset"
        : in_weight ? "weight"
                    : "dual",
        in_offset   ? offset_[i]
        : in_weight ? weight_[i]
                    : dual_[i],
        i, columns);
  }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

  float* offset_;
  float* dual_;
  uint8_t* mask_;
  const float* weight_;
  std::atomic<int64_t> changed_{0};
  std::atomic<int64_t> refused_{kNone};  // start of the first chunk with a z that is not finite
  Entries<&load_step>::Function load_ = Entries<&load_step>::choose();
  Entries<&load_magnitudes>::Function reload_ = Entries<&load_magnitudes>::choose();
  Entries<&finish_step>::Function finish_ = Entries<&finish_step>::choose();
};

SPARSEKERN_INLINE void keep_largest(const int32_t* keys, int64_t count, int64_t k, uint8_t* kept) {
  if (k == 0 || k == count) {
    std::fill_n(kept, count, static_cast<uint8_t>(k != 0));
  } else {
    write_mask(keys, count, kth_largest(keys, count, k), kept);
  }
}

// Selects within each chunk separately: choose(keys, count, kept).
template <class Choose>
void step_by_chunks(Step& step, int64_t total, int64_t chunk, const Choose& choose, const Executor& executor) {
  parallel_for(executor, (total + chunk - 1) / chunk, 1 + 16384 / chunk, [&](int64_t first, int64_t last) {
    std::vector<int32_t> keys(static_cast<size_t>(chunk));
    std::vector<uint8_t> kept(static_cast<size_t>(chunk));
    for (int64_t begin = first * chunk; begin < std::min(last * chunk, total); begin += chunk) {
      const int64_t count = std::min(chunk, total - begin);
      if (step.load(begin, count, keys.data())) continue;
      choose(keys.data(), count, kept.data());
      step.finish(begin, count, kept.data());
    }
  });
}

void run_step(Step& step, const StepPattern& pattern, int64_t rows, int64_t columns, const Executor& executor) {
  if (pattern.n > 0) {
    const Ranker rank = choose_ranker(pattern.m);
    const int64_t chunk = kSelectionChunk / pattern.m * pattern.m;
    return step_by_chunks(
        step, rows * columns, chunk,
        [&](const int32_t* keys, int64_t count, uint8_t* kept) { rank(keys, count / pattern.m, pattern.n, pattern.m, kept); },
        executor);
  }
  if (!pattern.whole_matrix) {
    const auto choose = Entries<&keep_largest>::choose();
    return step_by_chunks(
        step, rows * columns, columns,
        [&](const int32_t* keys, int64_t count, uint8_t* kept) { choose(keys, count, pattern.k, kept); }, executor);
  }
  MatrixSelection<Step>(step, rows * columns, pattern.k, executor).run([&](int64_t begin, int64_t count, const uint8_t* kept) {
    step.finish(begin, count, kept);
  });
}

}  // namespace

int64_t admm_step_(
    float* offset, float* dual, uint8_t* mask, const float* weight, const StepPattern& pattern, int64_t rows, int64_t columns,
    const Executor& executor) {
  if (rows * columns == 0) return 0;
  Step step(offset, dual, mask, weight);
  run_step(step, pattern, rows, columns, executor);
  step.require_finite(columns);
  return step.changed();
}

}  // namespace sparsekern::cpu
