#include "cpu/nm_q4_tensors.h"
#include "cpu/packed_linear_tensors.h"

namespace sparsekern::cpu {

namespace {

Tensor nm_q4_linear_of(Tensor x, Tensor blocks, int64_t n, int64_t m, int64_t out_features, std::optional<Tensor> bias) {
  const LinearTensors linear(x, out_features, bias);
  const NmQ4Tensors packed(blocks, n, m, out_features, linear.columns);
  if (out_features == 0) return linear.y;  // without allocating activations, however many tokens there are
  nm_q4_linear(
      linear.x.const_data_ptr(), linear.dtype, linear.tokens, linear.columns, packed.rows, linear.bias_data(),
      linear.y.mutable_data_ptr(), torch_executor());
  return linear.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("nm_q4_linear", TORCH_BOX(&nm_q4_linear_of)); }

}  // namespace sparsekern::cpu
