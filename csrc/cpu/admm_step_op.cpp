#include <string>

#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

Tensor admm_step_of(Tensor offset, Tensor dual, Tensor mask, Tensor weight, int64_t n, int64_t m, int64_t k, std::string scope) {
  check(weight.dim() == 2 && weight.scalar_type() == ScalarType::Float, "weight: expected 2 dimensions of float32");
  check_like(offset, weight, ScalarType::Float, "offset: expected float32 of the shape of weight");
  check_like(dual, weight, ScalarType::Float, "dual: expected float32 of the shape of weight");
  check_like(mask, weight, ScalarType::Bool, "mask: expected bool of the shape of weight");
  check(
      n == 0 || (n >= 1 && n < m && m <= 64 && weight.size(1) % m == 0),
      "n, m: expected 1 <= n < m <= 64 with columns divisible by m");
  check(scope == "row" || scope == "matrix", "scope: expected row or matrix");
  const bool whole_matrix = scope == "matrix";
  check(n > 0 || (k >= 0 && k <= (whole_matrix ? weight.numel() : weight.size(1))), "k: expected 0 to the number of weights");
  const Tensor dense_weight = torch::stable::contiguous(weight);
  Tensor changed = torch::stable::new_empty(weight, {}, ScalarType::Long);
  in_place(offset, [&](Tensor& dense_offset) {
    in_place(dual, [&](Tensor& dense_dual) {
      in_place(mask, [&](Tensor& dense_mask) {
        *static_cast<int64_t*>(changed.mutable_data_ptr()) = admm_step_(
            float_data(dense_offset), float_data(dense_dual), byte_data(dense_mask), const_float_data(dense_weight),
            {n, m, k, whole_matrix}, weight.size(0), weight.size(1), torch_executor());
      });
    });
  });
  return changed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("admm_step_", TORCH_BOX(&admm_step_of)); }

}  // namespace sparsekern::cpu
