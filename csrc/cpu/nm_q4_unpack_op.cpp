#include <tuple>

#include "cpu/nm_q4_tensors.h"

namespace sparsekern::cpu {

namespace {

std::tuple<Tensor, Tensor> nm_q4_unpack_of(Tensor blocks, int64_t n, int64_t m, int64_t out_features, int64_t in_features) {
  const NmQ4Tensors packed(blocks, n, m, out_features, in_features);
  Tensor weight = torch::stable::new_empty(blocks, {out_features, in_features}, ScalarType::Float);
  Tensor scales = torch::stable::new_empty(blocks, {out_features, nm_q4::blocks(in_features)}, ScalarType::Half);
  nm_q4_unpack(packed.rows, in_features, float_data(weight), scales.mutable_data_ptr(), torch_executor());
  return {weight, scales};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("nm_q4_unpack", TORCH_BOX(&nm_q4_unpack_of)); }

}  // namespace sparsekern::cpu
