// gated_split: updates the auxiliary activations of a gated feed-forward network in one pass.
//
// Floor: arithmetic. An entry takes four reads and two writes against `steps + 3` exponentials and twice as many divisions, all in
// vector registers (split.h). Entries are independent, so that the result does not depend on the threads.
#include "cpu/split.h"

namespace sparsekern::cpu {

void gated_split(const SplitProblem& problem, void* z, void* s, const Executor& executor) {
  dispatch_dtype(problem.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const split::Outputs<T> out{static_cast<T*>(z), static_cast<T*>(s)};
    switch (problem.activation) {
      case Activation::silu: return split::run<&split::split_range<true, Activation::silu, T>>(problem, out, executor);
      case Activation::gelu: return split::run<&split::split_range<true, Activation::gelu, T>>(problem, out, executor);
      case Activation::gelu_tanh: return split::run<&split::split_range<true, Activation::gelu_tanh, T>>(problem, out, executor);
      case Activation::relu: break;
    }
    return split::run<&split::split_range<true, Activation::relu, T>>(problem, out, executor);
  });
}

}  // namespace sparsekern::cpu
