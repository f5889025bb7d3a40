// plain_split: updates the pre-activations of a feed-forward network without a gate in one pass.
//
// Floor: three reads and one write for ReLU, which has a closed form; the exponentials of split.h for smooth activations. Entries
// are independent, so that the result does not depend on the threads.
#include "cpu/split.h"

namespace sparsekern::cpu {

namespace {

// On either side of zero the objective is a parabola. Takes the lower of the two minima; of equal ones, that of the active side.
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

}  // namespace

void plain_split(const SplitProblem& problem, void* z, const Executor& executor) {
  dispatch_dtype(problem.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const split::Outputs<T> out{nullptr, static_cast<T*>(z)};
    switch (problem.activation) {
      case Activation::silu: return split::run<&split::split_range<false, Activation::silu, T>>(problem, out, executor);
      case Activation::gelu: return split::run<&split::split_range<false, Activation::gelu, T>>(problem, out, executor);
      case Activation::gelu_tanh: return split::run<&split::split_range<false, Activation::gelu_tanh, T>>(problem, out, executor);
      case Activation::relu: break;
    }
    return split::run<&relu_range<T>>(problem, out, executor);
  });
}

}  // namespace sparsekern::cpu
