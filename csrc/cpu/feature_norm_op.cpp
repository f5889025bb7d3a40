#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

void check_feature_sums(const Tensor& tensor, int64_t features, const char* message) {
  check(tensor.dim() == 1 && tensor.size(0) == features && tensor.scalar_type() == ScalarType::Float, message);
}

void feature_norm_of(Tensor sum_squares, Tensor x, std::optional<Tensor> row_mask, std::optional<Tensor> sum) {
  check(x.dim() == 2, "x: expected [tokens, features]");
  check_feature_sums(sum_squares, x.size(1), "sum_squares: expected a float32 for each feature of x");
  if (sum) check_feature_sums(*sum, x.size(1), "sum: expected a float32 for each feature of x");
  const DType dtype = dtype_of(x, "x: expected dtype float32, bfloat16 or float16");
  const Tensor rows = torch::stable::contiguous(x);
  const RowMask mask(row_mask, x.size(0));
  const auto run = [&](Tensor& squares, float* sums) {
    feature_norm_(float_data(squares), sums, rows.const_data_ptr(), dtype, x.size(0), x.size(1), mask.data, torch_executor());
  };
  in_place(sum_squares, [&](Tensor& squares) {
    if (!sum) return run(squares, nullptr);
    in_place(*sum, [&](Tensor& sums) { run(squares, float_data(sums)); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("feature_norm_", TORCH_BOX(&feature_norm_of)); }

}  // namespace sparsekern::cpu
