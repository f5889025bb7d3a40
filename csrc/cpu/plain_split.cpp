// plain_split: the pre-activations of a feed-forward network without a gate, updated in one pass.
//
// ReLU has a closed form, so that the three reads and the write are all it costs; the smooth activations are bound by the exponentials
// of split.h. Every entry is on its own, so the result does not depend on the threads.
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/split.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kGrain = 1 << 12;

// On either side of zero the objective is a parabola; the lower of the two minima, of equal ones that of the active side.
template <class T>
SPARSEKERN_INLINE void relu_range(split::Inputs<T> in, split::Outputs<T> out, int64_t begin, int64_t end, float ratio, int64_t) {
  const float scale = 1.0f / (1.0f + ratio);
  for (int64_t i = begin; i < end; ++i) {
    const float p = to_float(in.p[i]), m = to_float(in.gate[i]);
    const float blend = (ratio * p + m) * scale;
    const float active = select(blend < 0.0f, 0.0f, blend);
    const float silent = select(m > 0.0f, 0.0f, m);
    const float active_cost = ratio * (p - active) * (p - active) + (active - m) * (active - m);
    const float silent_cost = ratio * p * p + (silent - m) * (silent - m);
    out.s[i] = from_float<T>(select(silent_cost < active_cost, silent, active));
  }
}

template <auto kRange, class T>
void run(const split::Inputs<T>& in, const split::Outputs<T>& out, int64_t entries, float ratio, int64_t steps, const Executor& executor) {
  const auto entry = Entries<kRange>::choose();
  parallel_for(executor, entries, kGrain, [&](int64_t begin, int64_t end) { entry(in, out, begin, end, ratio, steps); });
}

}  // namespace

void plain_split(
    const void* activated,
    const void* preactivation,
    const void* start,
    DType dtype,
    int64_t entries,
    Activation activation,
    float ratio,
    int64_t steps,
    void* z,
    const Executor& executor) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const split::Inputs<T> in{
        static_cast<const T*>(activated), nullptr, static_cast<const T*>(preactivation), static_cast<const T*>(start)};
    const split::Outputs<T> out{nullptr, static_cast<T*>(z)};
    switch (activation) {
      case Activation::silu: return run<&split::split_range<false, Activation::silu, T>>(in, out, entries, ratio, steps, executor);
      case Activation::gelu: return run<&split::split_range<false, Activation::gelu, T>>(in, out, entries, ratio, steps, executor);
      case Activation::gelu_tanh:
        return run<&split::split_range<false, Activation::gelu_tanh, T>>(in, out, entries, ratio, steps, executor);
      case Activation::relu: break;
    }
    return run<&relu_range<T>>(in, out, entries, ratio, steps, executor);
  });
}

}  // namespace sparsekern::cpu
