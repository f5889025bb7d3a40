// feature_norm_: sums of squares (and sums) over tokens, in one streaming pass.
//
// Floor: one read of x. A task is a chunk of tokens by a strip of features whose sums stay in L1. Every 32 tokens the float sums
// are added to double sums, so that rounding does not grow with the number of tokens. Chunks are added in order, so that the result
// does not depend on the number of threads.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/finite.h"
#include "cpu/kernels.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kChunkTokens = 256;
constexpr int64_t kStrip = 1024;
constexpr int64_t kFloatTokens = 32;

// A strip of x: `tokens` rows of `features` elements, `stride` apart. A null `mask` includes every token.
template <class T>
struct Strip {
  const T* x;
  int64_t tokens;
  int64_t features;
  int64_t stride;
  const uint8_t* mask;
};

// Adds the sums of a strip to `squares` and, unless it is null, to `sums`. Returns whether every included element is finite.
template <class T>
SPARSEKERN_INLINE bool add_strip(Strip<T> strip, double* squares, double* sums) {
  float square[kStrip];
  float sum[kStrip];
  float check[kStrip] = {};
  for (int64_t first = 0; first < strip.tokens; first += kFloatTokens) {
    std::fill_n(square, strip.features, 0.0f);
    std::fill_n(sum, strip.features, 0.0f);
    for (int64_t token = first; token < std::min(first + kFloatTokens, strip.tokens); ++token) {
      if (strip.mask != nullptr && strip.mask[token] == 0) continue;
      const T* row = strip.x + token * strip.stride;
      for (int64_t j = 0; j < strip.features; ++j) {
        const float value = to_float(row[j]);
        square[j] += value * value;
        sum[j] += value;
        check[j] += value * 0.0f;  // stays zero unless a value is NaN or Inf
      }
    }
    for (int64_t j = 0; j < strip.features; ++j) squares[j] += static_cast<double>(square[j]);
    if (sums != nullptr) {
      for (int64_t j = 0; j < strip.features; ++j) sums[j] += static_cast<double>(sum[j]);
    }
  }
  bool finite = true;
  for (int64_t j = 0; j < strip.features; ++j) finite &= check[j] == 0.0f;
  return finite;
}

void add_chunks(const std::vector<double>& partial, int64_t chunks, int64_t features, float* total) {
  for (int64_t j = 0; j < features; ++j) {
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[static_cast<size_t>(chunk * features + j)];
    total[j] = static_cast<float>(static_cast<double>(total[j]) + sum);
  }
}

template <class T>
void accumulate(
    float* sum_squares, float* sum, const T* x, DType dtype, int64_t tokens, int64_t features, const uint8_t* mask,
    const Executor& executor) {
  const auto add = Entries<&add_strip<T>>::choose();
  const int64_t chunks = (tokens + kChunkTokens - 1) / kChunkTokens;
  const int64_t strips = (features + kStrip - 1) / kStrip;
  std::vector<double> squares(static_cast<size_t>(chunks * features));
  std::vector<double> sums(sum == nullptr ? 0 : squares.size());
  std::atomic<bool> finite{true};
  parallel_for(executor, chunks * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t token = task / strips * kChunkTokens;
      const int64_t feature = task % strips * kStrip;
      const Strip<T> strip{
          x + token * features + feature, std::min(kChunkTokens, tokens - token), std::min(kStrip, features - feature), features,
          mask == nullptr ? nullptr : mask + token};
      const int64_t place = task / strips * features + feature;
      if (!add(strip, squares.data() + place, sum == nullptr ? nullptr : sums.data() + place)) finite = false;
    }
  });
  if (!finite) require_finite("x", x, dtype, tokens, features, mask, executor);  // throws, naming the place
  add_chunks(squares, chunks, features, sum_squares);
  if (sum != nullptr) add_chunks(sums, chunks, features, sum);
}

}  // namespace

void feature_norm_(
    float* sum_squares, float* sum, const void* x, DType dtype, int64_t tokens, int64_t features, const uint8_t* row_mask,
    const Executor& executor) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    accumulate(sum_squares, sum, static_cast<const T*>(x), dtype, tokens, features, row_mask, executor);
  });
}

}  // namespace sparsekern::cpu
