// Registers the ops on statistics and masks with torch. Solvers: register_solvers.cpp; packed weights: register_packed.cpp.
#include <string>

#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

void gram(Tensor gram, Tensor x, std::optional<Tensor> row_mask, double alpha) {
  check_square_float(gram, "gram: expected a square float32 matrix");
  check(x.dim() == 2 && x.size(1) == gram.size(0), "x: expected [tokens, features] with the features of gram");
  const DType dtype = dtype_of(x, "x: expected dtype float32, bfloat16 or float16");
  const Tensor rows = torch::stable::contiguous(x);
  const RowMask mask(row_mask, x.size(0));
  in_place(gram, [&](Tensor& dense) {
    gram_(
        float_data(dense), rows.const_data_ptr(), dtype, x.size(0), x.size(1), mask.data, static_cast<float>(alpha),
        torch_executor());
  });
}

void gram_symmetrize(Tensor gram) {
  check_square_float(gram, "gram: expected a square float32 matrix");
  in_place(gram, [](Tensor& dense) { gram_symmetrize_(float_data(dense), dense.size(0), torch_executor()); });
}

void check_feature_sums(const Tensor& tensor, int64_t features, const char* message) {
  check(tensor.dim() == 1 && tensor.size(0) == features && tensor.scalar_type() == ScalarType::Float, message);
}

void feature_norm(Tensor sum_squares, Tensor x, std::optional<Tensor> row_mask, std::optional<Tensor> sum) {
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

Tensor nm_mask_of(Tensor scores, int64_t n, int64_t m) {
  const DType dtype = dtype_of(scores, "scores: expected dtype float32, bfloat16 or float16");
  check(scores.dim() == 2, "scores: expected 2 dimensions");
  check(n >= 1 && n < m && m <= 64, "n, m: expected 1 <= n < m <= 64");
  check(scores.size(1) % m == 0, "scores: expected columns divisible by m");
  const Tensor dense = torch::stable::contiguous(scores);
  Tensor mask = new_mask(scores);
  nm_mask(dense.const_data_ptr(), dtype, scores.size(0), scores.size(1), n, m, byte_data(mask), torch_executor());
  return mask;
}

Tensor topk_mask_of(Tensor scores, int64_t k, std::string scope) {
  const DType dtype = dtype_of(scores, "scores: expected dtype float32, bfloat16 or float16");
  check(scores.dim() == 2, "scores: expected 2 dimensions");
  check(scope == "row" || scope == "matrix", "scope: expected row or matrix");
  check(k >= 0 && k <= (scope == "row" ? scores.size(1) : scores.numel()), "k: expected 0 to the number of scores");
  const Tensor dense = torch::stable::contiguous(scores);
  Tensor mask = new_mask(scores);
  topk_mask(dense.const_data_ptr(), dtype, scores.size(0), scores.size(1), k, scope == "matrix", byte_data(mask), torch_executor());
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("feature_norm_", TORCH_BOX(&feature_norm));
  m.impl("gram_", TORCH_BOX(&gram));
  m.impl("gram_symmetrize_", TORCH_BOX(&gram_symmetrize));
  m.impl("nm_mask", TORCH_BOX(&nm_mask_of));
  m.impl("topk_mask", TORCH_BOX(&topk_mask_of));
}

}  // namespace sparsekern::cpu
