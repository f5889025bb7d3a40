#include <tuple>

#include "cpu/batch.h"

namespace sparsekern::cpu {

namespace {

std::tuple<Tensor, Tensor> reverse_cholesky_of(Tensor gram, double damping) {
  const Batch batch(gram, 2);
  const int64_t last = gram.dim() - 1;
  check(
      (gram.dim() == 2 || batch.given) && gram.size(last) == gram.size(last - 1) && gram.scalar_type() == ScalarType::Float,
      "gram: expected a square float32 matrix, or a batch of them");
  const int64_t features = gram.size(last);
  const Tensor dense = torch::stable::contiguous(gram);
  Tensor factor = torch::stable::new_empty(gram, batch.shape({features, features}));
  Tensor damping_used = torch::stable::new_empty(gram, batch.shape({}), ScalarType::Double);
  const float* in = const_float_data(dense);
  float* out = float_data(factor);
  auto* used = static_cast<double*>(damping_used.mutable_data_ptr());
  for_each_problem(batch, torch_executor(), [&](int64_t i, const Executor& executor) {
    const int64_t offset = i * features * features;
    used[i] = cpu::reverse_cholesky(in + offset, features, damping, out + offset, executor);
  });
  return {factor, damping_used};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("reverse_cholesky", TORCH_BOX(&reverse_cholesky_of)); }

}  // namespace sparsekern::cpu
