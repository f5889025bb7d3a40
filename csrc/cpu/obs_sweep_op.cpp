#include <string>
#include <tuple>

#include "cpu/batch.h"

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
  const Batch batch(weight, 2);
  const int64_t first = batch.given ? 1 : 0;
  check(weight.dim() == first + 2, "weight: expected 2 dimensions, or 3 for a batch");
  const int64_t rows = weight.size(first), columns = weight.size(first + 1);
  check(
      factor.dim() == first + 2 && factor.scalar_type() == ScalarType::Float && (!batch.given || factor.size(0) == batch.count) &&
          factor.size(first) == columns && factor.size(first + 1) == columns,
      "factor: expected float32 with one row and column for each input feature of weight, for each weight of a batch");
  check(block_size > 0, "block_size: expected at least 1");
  check(n >= 0 && (n == 0 || n < m), "n, m: expected 0 < n < m, or 0 for a sparsity");
  check(sparsity >= 0.0 && sparsity <= 1.0, "sparsity: expected a share between 0 and 1");
  const DType dtype = dtype_of(weight, "weight: expected dtype float32, bfloat16 or float16");
  std::optional<Tensor> fixed;
  if (mask) {
    check(same_shape(*mask, weight) && mask->scalar_type() == ScalarType::Bool, "mask: expected bool of the shape of weight");
    fixed = torch::stable::contiguous(*mask);
  }
  const SweepPattern pattern{n, m, sparsity, scope_of(scope), block_size};
  require_whole_groups(pattern, columns);
  const Tensor dense_weight = torch::stable::contiguous(weight), dense_factor = torch::stable::contiguous(factor);
  Tensor new_weight = torch::stable::new_empty(weight, batch.shape({rows, columns}));
  Tensor chosen = torch::stable::new_empty(weight, batch.shape({rows, columns}), ScalarType::Bool);
  Tensor row_error = torch::stable::new_empty(weight, batch.shape({rows}), ScalarType::Float);
  const auto* in = static_cast<const uint8_t*>(dense_weight.const_data_ptr());
  const auto* kept = fixed ? static_cast<const uint8_t*>(fixed->const_data_ptr()) : nullptr;
  auto* out = static_cast<uint8_t*>(new_weight.mutable_data_ptr());
  const int64_t entries = rows * columns, bytes = entries * weight.element_size();
  for_each_problem(batch, torch_executor(), [&](int64_t i, const Executor& executor) {
    obs_sweep(
        in + i * bytes, dtype, const_float_data(dense_factor) + i * columns * columns, kept ? kept + i * entries : nullptr, pattern,
        rows, columns, out + i * bytes, byte_data(chosen) + i * entries, float_data(row_error) + i * rows, executor);
  });
  return {new_weight, chosen, row_error};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("obs_sweep", TORCH_BOX(&obs_sweep_of)); }

}  // namespace sparsekern::cpu
