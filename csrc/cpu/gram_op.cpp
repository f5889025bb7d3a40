#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

void gram_of(Tensor gram, Tensor x, std::optional<Tensor> row_mask, double alpha) {
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("gram_", TORCH_BOX(&gram_of)); }

}  // namespace sparsekern::cpu
