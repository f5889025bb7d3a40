// Registers the ops that make packed weights, unpack them and multiply by them.
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "common/packed_rows.h"
#include "cpu/tensors.h"
#include "stable/semi_structured_tensors.h"

namespace sparsekern::cpu {

namespace {

std::tuple<Tensor, Tensor> semi_structured_pack_of(Tensor weight) {
  const semi_structured::Type type = semi_structured::type_of(weight, "weight: expected dtype bfloat16, float16, float32 or int8");
  semi_structured::Packed packed = semi_structured::new_packed(weight);
  const Tensor dense = torch::stable::contiguous(weight);
  semi_structured_pack(
      dense.const_data_ptr(), type, weight.size(0), weight.size(1), packed.values.mutable_data_ptr(),
      packed.meta.mutable_data_ptr(), torch_executor());
  return {packed.values, packed.meta};
}

std::tuple<Tensor, Tensor> semi_structured_prune_pack_of(Tensor weight, std::optional<Tensor> scores) {
  const DType dtype = dtype_of(weight, "weight: expected dtype float32, bfloat16 or float16");
  semi_structured::Packed packed = semi_structured::new_packed(weight);
  const Tensor dense = torch::stable::contiguous(weight);
  DType scores_dtype = dtype;
  if (scores) {
    scores_dtype = dtype_of(*scores, "scores: expected dtype float32, bfloat16 or float16");
    check(
        scores->dim() == 2 && scores->size(0) == weight.size(0) && scores->size(1) == weight.size(1),
        "scores: expected the shape of weight");
    scores = torch::stable::contiguous(*scores);
  }
  semi_structured_prune_pack(
      dense.const_data_ptr(), dtype, scores ? scores->const_data_ptr() : nullptr, scores_dtype, weight.size(0), weight.size(1),
      packed.values.mutable_data_ptr(), packed.meta.mutable_data_ptr(), torch_executor());
  return {packed.values, packed.meta};
}

Tensor semi_structured_unpack_of(Tensor values, Tensor meta) {
  semi_structured::check_packed(values, meta);
  const int64_t rows = values.size(0), columns = 2 * values.size(1);
  const Tensor dense_values = torch::stable::contiguous(values);
  const Tensor dense_meta = torch::stable::contiguous(meta);
  Tensor weight = torch::stable::new_empty(values, {rows, columns});
  semi_structured_unpack(
      dense_values.const_data_ptr(), dense_meta.const_data_ptr(), static_cast<int>(values.element_size()), rows, columns,
      weight.mutable_data_ptr(), torch_executor());
  return weight;
}

// Products with packed weights are called for every token, so what needs no copy goes through no dispatcher.
Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// As torch::stable::new_empty, which boxes six arguments for the dispatcher.
Tensor new_rows(const Tensor& like, const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= shape[i]) strides[i] = stride;
  int32_t dtype;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Inputs and outputs of a product with packed weights.
struct LinearTensors {
  Tensor x, y;
  std::optional<Tensor> bias;
  DType dtype;
  int64_t tokens, columns;

  LinearTensors(const Tensor& x_, const Tensor& values, int64_t rows, const std::optional<Tensor>& bias_)
      : x(dense(x_)), y(x), dtype(dtype_of(x_, "x: expected dtype float32, bfloat16 or float16")), tokens(1) {
    check(x.dim() > 0, "x: expected at least 1 dimension");
    check(values.scalar_type() == x.scalar_type(), "values: expected the dtype of x");
    columns = x.size(x.dim() - 1);
    std::vector<int64_t> shape;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) {
      shape.push_back(x.size(i));
      tokens *= x.size(i);
    }
    shape.push_back(rows);
    y = new_rows(x, shape);
    if (!bias_) return;
    check(
        bias_->dim() == 1 && bias_->size(0) == rows && bias_->scalar_type() == x.scalar_type(),
        "bias: expected one value of the dtype of x for each row");
    bias = dense(*bias_);
  }

  const void* bias_data() const { return bias ? bias->const_data_ptr() : nullptr; }

  // With bf16 arithmetic, PyTorch's product of many tokens is far faster than one in float32, also after the weight was expanded.
  bool wants_dense_weight() const {
    return tokens > kFewTokens && dtype == DType::bf16 && current_isa() >= Isa::avx512_bf16_emulated;
  }

  template <class Expand>
  Tensor multiply_dense(int64_t rows, const Expand& expand) const {
    Tensor weight = torch::stable::new_empty(x, {rows, columns});
    expand(weight.mutable_data_ptr());
    std::array<StableIValue, 3> stack{
        torch::stable::detail::from(x), torch::stable::detail::from(weight), torch::stable::detail::from(bias)};
    if (torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION) != 0) {
      throw std::runtime_error("torch.nn.functional.linear failed on the expanded weight");
    }
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
};

Tensor bitmask_linear_of(Tensor x, Tensor values, Tensor bitmask, Tensor starts, Tensor order, std::optional<Tensor> bias) {
  check(order.dim() == 1 && order.scalar_type() == ScalarType::Int, "order: expected int32 [rows]");
  const int64_t rows = order.size(0);
  LinearTensors linear(x, values, rows, bias);
  const int64_t lanes = packed_rows::lanes(size_of(linear.dtype));
  check(
      values.dim() == 1 && values.size(0) % lanes == 0 && values.size(0) / lanes >= packed_rows::kSlack,
      "values: expected whole units, 64 of them to spare");
  check(
      bitmask.dim() == 2 && bitmask.scalar_type() == ScalarType::Long && bitmask.size(0) == rows &&
          bitmask.size(1) == packed_rows::words(linear.columns),
      "bitmask: expected int64 [rows, ceil(in_features / 64)]");
  check(
      starts.dim() == 1 && starts.scalar_type() == ScalarType::Long && starts.size(0) == packed_rows::tiles(rows) + 1,
      "starts: expected int64 [ceil(rows / 16) + 1]");
  values = dense(values);
  bitmask = dense(bitmask);
  starts = dense(starts);
  order = dense(order);
  const BitmaskRows packed{
      values.const_data_ptr(),
      values.size(0),
      static_cast<const uint64_t*>(bitmask.const_data_ptr()),
      static_cast<const int64_t*>(starts.const_data_ptr()),
      static_cast<const int32_t*>(order.const_data_ptr()),
      rows};
  if (linear.wants_dense_weight()) {
    return linear.multiply_dense(
        rows, [&](void* weight) { bitmask_expand(packed, linear.dtype, linear.columns, weight, torch_executor()); });
  }
  bitmask_linear(
      linear.x.const_data_ptr(), linear.dtype, linear.tokens, linear.columns, packed, linear.bias_data(),
      linear.y.mutable_data_ptr(), torch_executor());
  return linear.y;
}

Tensor nm_linear_of(Tensor x, Tensor values, Tensor codes, int64_t n, int64_t m, std::optional<Tensor> bias) {
  check(n >= 1 && n < m && m <= packed_rows::kMostM, "n, m: expected 1 <= n < m <= 16");
  check(values.dim() == 2 && codes.dim() == 2, "values, codes: expected 2 dimensions");
  const int64_t rows = values.size(0);
  LinearTensors linear(x, values, rows, bias);
  const int64_t stored = packed_rows::stored_per_row(linear.columns, n, m, size_of(linear.dtype));
  check(linear.columns % m == 0, "x: expected features divisible by m");
  check(values.size(1) == stored, "values: expected as many in a row as the features of x take");
  check(
      codes.scalar_type() == ScalarType::Int && codes.size(0) == rows && codes.size(1) == stored * packed_rows::code_bits(m) / 32,
      "codes: expected int32 of the shape that goes with values");
  values = dense(values);
  codes = dense(codes);
  const NmRows packed{values.const_data_ptr(), static_cast<const uint32_t*>(codes.const_data_ptr()), rows, n, m};
  if (linear.wants_dense_weight()) {
    return linear.multiply_dense(
        rows, [&](void* weight) { nm_expand(packed, linear.dtype, linear.columns, weight, torch_executor()); });
  }
  nm_linear(
      linear.x.const_data_ptr(), linear.dtype, linear.tokens, linear.columns, packed, linear.bias_data(),
      linear.y.mutable_data_ptr(), torch_executor());
  return linear.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("bitmask_linear", TORCH_BOX(&bitmask_linear_of));
  m.impl("nm_linear", TORCH_BOX(&nm_linear_of));
  m.impl("semi_structured_pack", TORCH_BOX(&semi_structured_pack_of));
  m.impl("semi_structured_prune_pack", TORCH_BOX(&semi_structured_prune_pack_of));
  m.impl("semi_structured_unpack", TORCH_BOX(&semi_structured_unpack_of));
}

}  // namespace sparsekern::cpu
