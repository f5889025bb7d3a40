// Arguments shared by the wrappers of bitmask_experts_linear and nm_experts_linear.
#pragma once

#include <optional>

#include "cpu/packed_linear_tensors.h"

namespace sparsekern::cpu {

// Inputs and outputs of a product with packed experts.
struct ExpertsTensors {
  Tensor x, ids, y;
  std::optional<Tensor> bias;
  DType dtype;
  int64_t columns, rows;
  ExpertChoice choice;

  ExpertsTensors(
      const Tensor& x_, const Tensor& experts_, const Tensor& values, int64_t experts, int64_t rows_,
      const std::optional<Tensor>& bias_)
      : x(dense(x_)),
        ids(dense(experts_)),
        y(x),
        dtype(dtype_of(x_, "x: expected dtype float32, bfloat16 or float16")),
        rows(rows_),
        choice{} {
    check(x.dim() == 2, "x: expected 2 dimensions");
    check(
        ids.dim() == 2 && ids.size(0) == x.size(0) && ids.scalar_type() == ScalarType::Long,
        "experts: expected int64 [tokens, choices]");
    check(values.scalar_type() == x.scalar_type(), "values: expected the dtype of x");
    columns = x.size(1);
    choice = {data_of<int64_t>(ids), ids.size(0), ids.size(1), experts};
    y = new_rows(x, {choice.tokens, choice.choices, rows});
    if (!bias_) return;
    check(
        bias_->dim() == 2 && bias_->size(0) == experts && bias_->size(1) == rows && bias_->scalar_type() == x.scalar_type(),
        "bias: expected one value of the dtype of x for each row of each expert");
    bias = dense(*bias_);
  }

  const void* bias_data() const { return bias ? bias->const_data_ptr() : nullptr; }
};

// The packed weights of all experts; `first` is that of the first one.
struct BitmaskExperts {
  Tensor values, bitmask, starts, order;
  BitmaskRows first;

  BitmaskExperts(
      const Tensor& values_, const Tensor& bitmask_, const Tensor& starts_, const Tensor& order_, DType dtype, int64_t columns)
      : values(dense(values_)), bitmask(dense(bitmask_)), starts(dense(starts_)), order(dense(order_)), first{} {
    const int64_t experts = order.size(0), rows = order.size(1), lanes = packed_rows::lanes(size_of(dtype));
    check(order.scalar_type() == ScalarType::Int, "order: expected int32 [experts, rows]");
    check(
        values.dim() == 1 && values.size(0) % lanes == 0 && values.size(0) / lanes >= packed_rows::kSlack,
        "values: expected a whole number of slots, 64 of them spare");
    check(
        bitmask.dim() == 3 && bitmask.scalar_type() == ScalarType::Long && bitmask.size(0) == experts && bitmask.size(1) == rows &&
            bitmask.size(2) == packed_rows::words(columns),
        "bitmask: expected int64 [experts, rows, ceil(columns / 64)]");
    check(
        starts.dim() == 2 && starts.scalar_type() == ScalarType::Long && starts.size(0) == experts &&
            starts.size(1) == packed_rows::tiles(rows) + 1,
        "starts: expected int64 [experts, ceil(rows / 16) + 1]");
    first = {values.const_data_ptr(),  values.size(0),          data_of<uint64_t>(bitmask),
             data_of<int64_t>(starts), data_of<int32_t>(order), rows};
  }
};

struct NmExperts {
  Tensor values, codes;
  NmRows first;

  NmExperts(const Tensor& values_, const Tensor& codes_, int64_t n, int64_t m, DType dtype, int64_t columns)
      : values(dense(values_)), codes(dense(codes_)), first{} {
    NmTensors::check_nm(n, m);
    const int64_t stored = packed_rows::stored_per_row(columns, n, m, size_of(dtype));
    check(columns % m == 0, "n, m: expected columns divisible by m");
    check(values.size(2) == stored, "values: expected in each row the number stored for its columns");
    check(
        codes.dim() == 3 && codes.scalar_type() == ScalarType::Int && codes.size(0) == values.size(0) &&
            codes.size(1) == values.size(1) && codes.size(2) == stored * packed_rows::code_bits(m) / 32,
        "codes: expected int32 in the shape that values requires");
    first = {values.const_data_ptr(), data_of<uint32_t>(codes), values.size(1), n, m};
  }
};

}  // namespace sparsekern::cpu
