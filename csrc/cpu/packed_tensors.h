// Packed weights as arguments of kernels: contiguous, and of the sizes that keep a kernel inside them.
#pragma once

#include "common/packed_rows.h"
#include "cpu/tensors.h"

namespace sparsekern::cpu {

// Products with packed weights are called for every token, so that a tensor that needs no copy bypasses the dispatcher.
inline Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

template <class T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

struct BitmaskTensors {
  Tensor values, bitmask, starts, order;
  BitmaskRows rows;

  BitmaskTensors(
      const Tensor& values_, const Tensor& bitmask_, const Tensor& starts_, const Tensor& order_, DType dtype, int64_t columns)
      : values(dense(values_)), bitmask(dense(bitmask_)), starts(dense(starts_)), order(dense(order_)), rows{} {
    check(order.dim() == 1 && order.scalar_type() == ScalarType::Int, "order: expected int32 [rows]");
    const int64_t count = order.size(0), lanes = packed_rows::lanes(size_of(dtype));
    check(
        values.dim() == 1 && values.size(0) % lanes == 0 && values.size(0) / lanes >= packed_rows::kSlack,
        "values: expected a whole number of slots, 64 of them spare");
    check(
        bitmask.dim() == 2 && bitmask.scalar_type() == ScalarType::Long && bitmask.size(0) == count &&
            bitmask.size(1) == packed_rows::words(columns),
        "bitmask: expected int64 [rows, ceil(columns / 64)]");
    check(
        starts.dim() == 1 && starts.scalar_type() == ScalarType::Long && starts.size(0) == packed_rows::tiles(count) + 1,
        "starts: expected int64 [ceil(rows / 16) + 1]");
    rows = {values.const_data_ptr(),  values.size(0),          data_of<uint64_t>(bitmask),
            data_of<int64_t>(starts), data_of<int32_t>(order), count};
  }
};

struct NmTensors {
  Tensor values, codes;
  NmRows rows;

  NmTensors(const Tensor& values_, const Tensor& codes_, int64_t n, int64_t m, DType dtype, int64_t columns)
      : values(dense(values_)), codes(dense(codes_)), rows{} {
    check_nm(n, m);
    check(values.dim() == 2 && codes.dim() == 2, "values, codes: expected 2 dimensions");
    const int64_t stored = packed_rows::stored_per_row(columns, n, m, size_of(dtype));
    check(columns % m == 0, "n, m: expected columns divisible by m");
    check(values.size(1) == stored, "values: expected in each row the number stored for its columns");
    check(
        codes.scalar_type() == ScalarType::Int && codes.size(0) == values.size(0) &&
            codes.size(1) == stored * packed_rows::code_bits(m) / 32,
        "codes: expected int32 in the shape that values requires");
    rows = {values.const_data_ptr(), data_of<uint32_t>(codes), values.size(0), n, m};
  }

  static void check_nm(int64_t n, int64_t m) {
    check(n >= 1 && n < m && m <= packed_rows::kMostM, "n, m: expected 1 <= n < m <= 16");
  }
};

}  // namespace sparsekern::cpu
