// masked_adamw_: one step of AdamW on the kept weights; pruned weights and their moments become zero.
//
// Floor: one read of weight, gradient, moments and mask, and one write of weight and moments: 29 bytes an element in float32, 2 more for
// a 16-bit copy. A chunk goes through several short loops in the first-level cache, so that memory is touched once.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "common/dtype.h"
#include "cpu/dispatch.h"
#include "cpu/finite.h"
#include "cpu/kernels.h"
#include "cpu/panels.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kChunk = 512;  // 14 KiB of tensors and buffers
constexpr int64_t kGrain = 32;   // chunks that a thread takes at least

// The instruction of a correctly rounded root, which compilers do not choose for a loop: std::sqrt may set errno.
template <class Target>
SPARSEKERN_INLINE void take_roots(float* values) {
  for (int64_t i = 0; i < kChunk; i += Target::kWidth) {
#if SPARSEKERN_X86
    using Vector = typename VectorOf<Target::kWidth>::Float;
    auto* place = reinterpret_cast<Vector*>(values + i);
    Vector root = *place;
    if constexpr (Target::kWidth == 4) {
      asm("sqrtps %0, %0" : "+x"(root));
    } else {
      asm("vsqrtps %0, %0" : "+x"(root));
    }
    *place = root;
#else
    for (int64_t lane = 0; lane < Target::kWidth; ++lane) values[i + lane] = std::sqrt(values[i + lane]);
#endif
  }
}

SPARSEKERN_INLINE float masked(float value, uint32_t kept) { return bits_to_float(float_to_bits(value) & kept); }

// The working memory of one chunk.
struct Workspace {
  alignas(64) float gradient[kChunk];
  alignas(64) float root[kChunk];
  alignas(64) uint32_t kept[kChunk];  // all ones where a weight is kept, zero elsewhere
};

template <class T>
SPARSEKERN_INLINE void load_gradient(const void* grad, int64_t begin, int64_t count, float scale, float* gradient) {
  const auto* source = static_cast<const T*>(grad) + begin;
  for (int64_t i = 0; i < count; ++i) gradient[i] = to_float(source[i]) * scale;
}

template <class T>
SPARSEKERN_INLINE void store_half(const float* weight, int64_t begin, int64_t count, void* half) {
  auto* target = static_cast<T*>(half) + begin;
  for (int64_t i = 0; i < count; ++i) target[i] = from_float<T>(weight[i]);
}

// Makes the gradients of a chunk. Returns whether one of a kept weight is not finite.
SPARSEKERN_INLINE bool make_gradients(const AdamTensors& in, const AdamStep& step, int64_t begin, int64_t count, Workspace& work) {
  switch (in.grad_dtype) {
    case DType::bf16: load_gradient<BFloat16>(in.grad, begin, count, step.grad_scale, work.gradient); break;
    case DType::f16: load_gradient<Half>(in.grad, begin, count, step.grad_scale, work.gradient); break;
    case DType::f32: load_gradient<float>(in.grad, begin, count, step.grad_scale, work.gradient); break;
  }
  if (in.anchor != nullptr) {
    const float *weight = in.weight + begin, *anchor = in.anchor + begin;
    for (int64_t i = 0; i < count; ++i) work.gradient[i] += step.pull * (weight[i] - anchor[i]);
  }
  if (in.mask != nullptr) {
    const uint8_t* mask = in.mask + begin;
    for (int64_t i = 0; i < count; ++i) work.kept[i] = 0u - static_cast<uint32_t>(mask[i] != 0);
  } else {
    std::fill_n(work.kept, count, ~0u);
  }
  int32_t highest = 0;
  for (int64_t i = 0; i < count; ++i) {
    work.gradient[i] = masked(work.gradient[i], work.kept[i]);
    const auto size = static_cast<int32_t>(float_to_bits(work.gradient[i]) & 0x7fffffffu);
    highest = size > highest ? size : highest;
  }
  return highest >= 0x7f800000;
}

// Takes the step of elements [begin, begin + count). Returns false, with nothing changed, if a gradient is not finite.
template <class Target>
SPARSEKERN_INLINE bool step_chunk(const AdamTensors& in, const AdamStep& step, int64_t begin, int64_t count) {
  Workspace work;
  if (make_gradients(in, step, begin, count, work)) return false;
  float *weight = in.weight + begin, *first = in.exp_avg + begin, *second = in.exp_avg_sq + begin;
  const float rest1 = step.rest1, rest2 = step.rest2;
  for (int64_t i = 0; i < count; ++i) {
    const float g = work.gradient[i];
    first[i] = masked(step.beta1 * first[i] + rest1 * g, work.kept[i]);
    second[i] = masked(step.beta2 * second[i] + rest2 * g * g, work.kept[i]);
    work.root[i] = second[i];
  }
  std::fill(work.root + count, work.root + kChunk, 0.0f);
  take_roots<Target>(work.root);
  for (int64_t i = 0; i < count; ++i) {
    const float change = step.rate * first[i] / (work.root[i] * step.root_scale + step.eps);
    weight[i] = masked(step.decay * weight[i] - change, work.kept[i]);
  }
  if (in.half != nullptr && in.half_dtype == DType::bf16) store_half<BFloat16>(weight, begin, count, in.half);
  if (in.half != nullptr && in.half_dtype == DType::f16) store_half<Half>(weight, begin, count, in.half);
  return true;
}

// Throws for the first kept gradient of a chunk that is not finite.
[[noreturn]] void refuse(const AdamTensors& in, const AdamStep& step, int64_t begin, int64_t count, int64_t columns) {
  Workspace work;
  make_gradients(in, step, begin, count, work);
  int64_t i = 0;
  while (std::isfinite(work.gradient[i])) ++i;
  const float grad = dispatch_dtype(in.grad_dtype, [&](auto* type) {
    return to_float(static_cast<const std::remove_pointer_t<decltype(type)>*>(in.grad)[begin + i]);
  });
  const bool anchored = in.anchor != nullptr && std::isfinite(grad);
  if (anchored && !std::isfinite(in.weight[begin + i])) refuse_nonfinite("weight", in.weight[begin + i], begin + i, columns);
  if (anchored && !std::isfinite(in.anchor[begin + i])) refuse_nonfinite("anchor", in.anchor[begin + i], begin + i, columns);
  refuse_nonfinite("grad", std::isfinite(grad) ? work.gradient[i] : grad, begin + i, columns);
}

}  // namespace

void masked_adamw_(const AdamTensors& tensors, const AdamStep& step, int64_t count, int64_t columns, const Executor& executor) {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  const auto run = TargetEntries<&step_chunk<Baseline>, &step_chunk<Avx2>, &step_chunk<Avx512>>::choose();
  std::atomic<int64_t> refused{kNone};  // the first chunk with a gradient that is not finite
  parallel_for(executor, ceil_div(count, kChunk), kGrain, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * kChunk;
      if (run(tensors, step, begin, std::min(kChunk, count - begin))) continue;
      int64_t seen = refused;
      while (chunk < seen && !refused.compare_exchange_weak(seen, chunk)) {
      }
    }
  });
  if (refused == kNone) return;
  const int64_t begin = refused * kChunk;
  refuse(tensors, step, begin, std::min(kChunk, count - begin), columns);
}

}  // namespace sparsekern::cpu
