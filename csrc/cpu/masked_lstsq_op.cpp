#include <string>
#include <tuple>

#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

Solver solver_of(const std::string& name) {
  if (name == "auto") return Solver::automatic;
  if (name == "cholesky") return Solver::cholesky;
  check(name == "cg", "solver: expected auto, cholesky or cg");
  return Solver::conjugate_gradients;
}

std::tuple<Tensor, Tensor, Tensor> masked_lstsq_of(
    Tensor weight, Tensor gram, Tensor mask, std::optional<Tensor> start, double damping, double tolerance, int64_t max_iterations,
    std::string solver) {
  check(weight.dim() == 2, "weight: expected 2 dimensions");
  const DType dtype = dtype_of(weight, "weight: expected dtype float32, bfloat16 or float16");
  check_square_float(gram, "gram: expected a square float32 matrix");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  check(gram.size(0) == columns, "gram: expected one row and column for each input feature of weight");
  check_like(mask, weight, ScalarType::Bool, "mask: expected bool of the shape of weight");
  const Tensor dense_weight = torch::stable::contiguous(weight), dense_gram = torch::stable::contiguous(gram);
  const Tensor dense_mask = torch::stable::contiguous(mask);
  std::optional<Tensor> dense_start;
  if (start) {
    check_like(*start, weight, weight.scalar_type(), "start: expected the shape and dtype of weight");
    dense_start = torch::stable::contiguous(*start);
  }
  Tensor new_weight = torch::stable::new_empty(weight, {rows, columns});
  Tensor row_error = torch::stable::new_empty(weight, {rows}, ScalarType::Float);
  Tensor unfinished = torch::stable::new_empty(weight, {}, ScalarType::Long);
  *static_cast<int64_t*>(unfinished.mutable_data_ptr()) = masked_lstsq(
      dense_weight.const_data_ptr(), dense_start ? dense_start->const_data_ptr() : nullptr, dtype, const_float_data(dense_gram),
      static_cast<const uint8_t*>(dense_mask.const_data_ptr()), {damping, tolerance, max_iterations, solver_of(solver)}, rows,
      columns, new_weight.mutable_data_ptr(), float_data(row_error), torch_executor());
  return {new_weight, row_error, unfinished};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("masked_lstsq", TORCH_BOX(&masked_lstsq_of)); }

}  // namespace sparsekern::cpu
