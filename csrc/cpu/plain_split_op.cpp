#include <string>

#include "cpu/split_tensors.h"

namespace sparsekern::cpu {

namespace {

Tensor plain_split_of(Tensor activated, Tensor preactivation, Tensor start, std::string activation, double ratio, int64_t steps) {
  const Alike<3> in({activated, preactivation, start});
  Tensor z = in.new_one();
  const SplitProblem problem{in.data(0),
                             nullptr,
                             in.data(1),
                             in.data(2),
                             in.dtype,
                             activated.numel(),
                             activation_of(activation),
                             static_cast<float>(ratio),
                             steps};
  plain_split(problem, z.mutable_data_ptr(), torch_executor());
  return z;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("plain_split", TORCH_BOX(&plain_split_of)); }

}  // namespace sparsekern::cpu
