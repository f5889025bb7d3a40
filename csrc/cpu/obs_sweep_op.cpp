#include <string>
#include <tuple>

#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

Scope scope_of(const std::string& name) {
  if (name == "block") return Scope::block;
  if (name == "row") return Scope::row;
  check(name == "matrix", "scope: expected block, row or matrix");
  return Scope::matrix;
}

std::tuple<Tensor, Tensor, Tensor> obs_sweep_of(
    Tensor weight, Tensor factor, int64_t n, int64_t m, double sparsity, std::string scope, int64_t block_size,
    std::optional<Tensor> mask) {
  check(weight.dim() == 2, "weight: expected 2 dimensions");
  check_square_float(factor, "factor: expected a square float32 matrix");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  check(factor.size(0) == columns, "factor: expected one row and column for each input feature of weight");
  check(block_size > 0, "block_size: expected at least 1");
  check(n >= 0 && (n == 0 || n < m), "n, m: expected 0 < n < m, or 0 for a sparsity");
  check(sparsity >= 0.0 && sparsity <= 1.0, "sparsity: expected a share between 0 and 1");
  const DType dtype = dtype_of(weight, "weight: expected dtype float32, bfloat16 or float16");
  std::optional<Tensor> fixed;
  if (mask) {
    check(
        mask->dim() == 2 && mask->size(0) == rows && mask->size(1) == columns && mask->scalar_type() == ScalarType::Bool,
        "mask: expected bool of the shape of weight");
    fixed = torch::stable::contiguous(*mask);
  }
  const Tensor dense_weight = torch::stable::contiguous(weight), dense_factor = torch::stable::contiguous(factor);
  Tensor new_weight = torch::stable::new_empty(weight, {rows, columns});
  Tensor chosen = new_mask(weight);
  Tensor row_error = torch::stable::new_empty(weight, {rows}, ScalarType::Float);
  obs_sweep(
      dense_weight.const_data_ptr(), dtype, static_cast<const float*>(dense_factor.const_data_ptr()),
      fixed ? static_cast<const uint8_t*>(fixed->const_data_ptr()) : nullptr,
      {mask ? 0 : n, m, sparsity, scope_of(scope), block_size}, rows, columns, new_weight.mutable_data_ptr(), byte_data(chosen),
      float_data(row_error), torch_executor());
  return {new_weight, chosen, row_error};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("obs_sweep", TORCH_BOX(&obs_sweep_of)); }

}  // namespace sparsekern::cpu
