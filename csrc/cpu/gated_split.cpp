// gated_split: the auxiliary activations of a gated feed-forward network, updated in one pass.
//
// Bound by arithmetic: four reads and two writes an entry against `steps + 3` exponentials and twice as many divisions, all in vector
// registers (split.h). Every entry is on its own, so the result does not depend on the threads.
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/split.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kGrain = 1 << 12;

template <Activation kActivation, class T>
void run(const split::Inputs<T>& in, const split::Outputs<T>& out, int64_t entries, float ratio, int64_t steps, const Executor& executor) {
  const auto entry = Entries<&split::split_range<true, kActivation, T>>::choose();
  parallel_for(executor, entries, kGrain, [&](int64_t begin, int64_t end) { entry(in, out, begin, end, ratio, steps); });
}

}  // namespace

void gated_split(
    const void* activated,
    const void* up,
    const void* gate,
    const void* start,
    DType dtype,
    int64_t entries,
    Activation activation,
    float ratio,
    int64_t steps,
    void* z,
    void* s,
    const Executor& executor) {
  dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const split::Inputs<T> in{
        static_cast<const T*>(activated), static_cast<const T*>(up), static_cast<const T*>(gate), static_cast<const T*>(start)};
    const split::Outputs<T> out{static_cast<T*>(z), static_cast<T*>(s)};
    switch (activation) {
      case Activation::silu: return run<Activation::silu, T>(in, out, entries, ratio, steps, executor);
      case Activation::gelu: return run<Activation::gelu, T>(in, out, entries, ratio, steps, executor);
      case Activation::gelu_tanh: return run<Activation::gelu_tanh, T>(in, out, entries, ratio, steps, executor);
      case Activation::relu: break;
    }
    return run<Activation::relu, T>(in, out, entries, ratio, steps, executor);
  });
}

}  // namespace sparsekern::cpu
