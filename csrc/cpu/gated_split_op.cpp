#include <string>
#include <tuple>

#include "cpu/split_tensors.h"

namespace sparsekern::cpu {

namespace {

std::tuple<Tensor, Tensor> gated_split_of(
    Tensor activated, Tensor up, Tensor gate, Tensor start, std::string activation, double ratio, int64_t steps) {
  const Alike<4> in({activated, up, gate, start});
  Tensor z = in.new_one(), s = in.new_one();
  const SplitProblem problem{in.data(0),
                             in.data(1),
                             in.data(2),
                             in.data(3),
                             in.dtype,
                             activated.numel(),
                             activation_of(activation),
                             static_cast<float>(ratio),
                             steps};
  gated_split(problem, z.mutable_data_ptr(), s.mutable_data_ptr(), torch_executor());
  return {z, s};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("gated_split", TORCH_BOX(&gated_split_of)); }

}  // namespace sparsekern::cpu
