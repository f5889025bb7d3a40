// The stable-ABI side of the CPU kernels: checks that keep a kernel inside its memory, outputs, and torch's thread pool.
// Friendly messages about shapes and dtypes come from the Python wrappers; these checks are for direct calls of torch.ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/bitmask_layout.h"
#include "common/nm_layout.h"
#include "common/packed_rows.h"
#include "cpu/kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace sparsekern::cpu {

namespace {

Executor torch_executor() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t begin, int64_t end, int64_t grain, Executor::RangeFunction function, void* context) {
            torch::stable::parallel_for(
                begin, end, grain, [=](int64_t range_begin, int64_t range_end) { function(range_begin, range_end, context); });
          }};
}

void check(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

float* float_data(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

const float* const_float_data(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

void check_square_float(const Tensor& tensor, const char* message) {
  check(tensor.dim() == 2 && tensor.size(0) == tensor.size(1) && tensor.scalar_type() == ScalarType::Float, message);
}

DType dtype_of(const Tensor& tensor, const char* message) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: throw std::invalid_argument(message);
  }
}

// A contiguous copy where one is needed, kept alive beside its pointer.
struct RowMask {
  std::optional<Tensor> tensor;
  const uint8_t* data = nullptr;

  RowMask(const std::optional<Tensor>& row_mask, int64_t tokens) {
    if (!row_mask) return;
    check(
        row_mask->dim() == 1 && row_mask->size(0) == tokens && row_mask->scalar_type() == ScalarType::Bool,
        "row_mask: expected one bool a token");
    tensor = torch::stable::contiguous(*row_mask);
    data = static_cast<const uint8_t*>(tensor->const_data_ptr());
  }
};

// Runs f on contiguous memory and copies back where the caller's tensor was strided.
template <class F>
void in_place(Tensor& tensor, const F& f) {
  Tensor dense = torch::stable::contiguous(tensor);
  f(dense);
  if (dense.data_ptr() != tensor.data_ptr()) torch::stable::copy_(tensor, dense);
}

void gram(Tensor gram, Tensor x, std::optional<Tensor> row_mask, double alpha) {
  check_square_float(gram, "gram: expected a square float32 matrix");
  check(x.dim() == 2 && x.size(1) == gram.size(0), "x: expected [tokens, features] with the features of gram");
  const DType dtype = dtype_of(x, "x: expected dtype float32, bfloat16 or float16");
  const Tensor rows = torch::stable::contiguous(x);
  const RowMask mask(row_mask, x.size(0));
  in_place(gram, [&](Tensor& dense) {
    gram_(float_data(dense), rows.const_data_ptr(), dtype, x.size(0), x.size(1), mask.data, static_cast<float>(alpha), torch_executor());
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
    feature_norm_(
        float_data(squares), sums, rows.const_data_ptr(), dtype, x.size(0), x.size(1), mask.data, torch_executor());
  };
  in_place(sum_squares, [&](Tensor& squares) {
    if (!sum) return run(squares, nullptr);
    in_place(*sum, [&](Tensor& sums) { run(squares, float_data(sums)); });
  });
}

Tensor new_mask(const Tensor& scores) {
  return torch::stable::new_empty(scores, {scores.size(0), scores.size(1)}, ScalarType::Bool);
}

uint8_t* byte_data(const Tensor& tensor) { return static_cast<uint8_t*>(tensor.mutable_data_ptr()); }

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
  topk_mask(
      dense.const_data_ptr(), dtype, scores.size(0), scores.size(1), k, scope == "matrix", byte_data(mask), torch_executor());
  return mask;
}

nm::Type nm_type_of(const Tensor& tensor, const char* message) {
  switch (tensor.scalar_type()) {
    case ScalarType::Char: return nm::Type::i8;
    case ScalarType::BFloat16: return nm::Type::bf16;
    case ScalarType::Half: return nm::Type::f16;
    case ScalarType::Float: return nm::Type::f32;
    default: throw std::invalid_argument(message);
  }
}

struct Packed {
  Tensor values, meta;
};

// Room for the packed form of a weight, whose shape is checked.
Packed new_packed(const Tensor& weight) {
  const nm::Format format = nm::format_of(static_cast<int>(weight.element_size()));
  check(
      weight.dim() == 2 && weight.size(0) % format.row_multiple == 0 && weight.size(1) % format.column_multiple() == 0,
      "weight: expected a shape that the layout divides");
  const int64_t rows = weight.size(0);
  const int64_t columns = weight.size(1);
  const ScalarType word = format.word_bits == 32 ? ScalarType::Int : ScalarType::Short;
  return {
      torch::stable::new_empty(weight, {rows, columns / 2}),
      torch::stable::new_empty(weight, {rows, columns / format.columns_per_word()}, word)};
}

std::tuple<Tensor, Tensor> nm_pack_of(Tensor weight) {
  const nm::Type type = nm_type_of(weight, "weight: expected dtype bfloat16, float16, float32 or int8");
  Packed packed = new_packed(weight);
  const Tensor dense = torch::stable::contiguous(weight);
  nm_pack(
      dense.const_data_ptr(), type, weight.size(0), weight.size(1), packed.values.mutable_data_ptr(),
      packed.meta.mutable_data_ptr(), torch_executor());
  return {packed.values, packed.meta};
}

std::tuple<Tensor, Tensor> nm_prune_pack_of(Tensor weight, std::optional<Tensor> scores) {
  const DType dtype = dtype_of(weight, "weight: expected dtype float32, bfloat16 or float16");
  Packed packed = new_packed(weight);
  const Tensor dense = torch::stable::contiguous(weight);
  DType scores_dtype = dtype;
  if (scores) {
    scores_dtype = dtype_of(*scores, "scores: expected dtype float32, bfloat16 or float16");
    check(
        scores->dim() == 2 && scores->size(0) == weight.size(0) && scores->size(1) == weight.size(1),
        "scores: expected the shape of weight");
    scores = torch::stable::contiguous(*scores);
  }
  nm_prune_pack(
      dense.const_data_ptr(), dtype, scores ? scores->const_data_ptr() : nullptr, scores_dtype, weight.size(0), weight.size(1),
      packed.values.mutable_data_ptr(), packed.meta.mutable_data_ptr(), torch_executor());
  return {packed.values, packed.meta};
}

Tensor nm_unpack_of(Tensor values, Tensor meta) {
  nm_type_of(values, "values: expected dtype bfloat16, float16, float32 or int8");
  const auto element_size = static_cast<int>(values.element_size());
  const nm::Format format = nm::format_of(element_size);
  check(values.dim() == 2 && meta.dim() == 2, "values, meta: expected 2 dimensions");
  const int64_t rows = values.size(0);
  const int64_t columns = 2 * values.size(1);
  check(
      rows % format.row_multiple == 0 && columns % format.column_multiple() == 0,
      "values: expected a shape that the layout divides");
  check(
      meta.scalar_type() == (format.word_bits == 32 ? ScalarType::Int : ScalarType::Short) && meta.size(0) == rows &&
          meta.size(1) == columns / format.columns_per_word(),
      "meta: expected the dtype and shape that go with values");
  const Tensor dense_values = torch::stable::contiguous(values);
  const Tensor dense_meta = torch::stable::contiguous(meta);
  Tensor weight = torch::stable::new_empty(values, {rows, columns});
  nm_unpack(
      dense_values.const_data_ptr(), dense_meta.const_data_ptr(), element_size, rows, columns, weight.mutable_data_ptr(),
      torch_executor());
  return weight;
}

std::tuple<Tensor, Tensor> bitmask_pack_of(Tensor weight) {
  const DType dtype = dtype_of(weight, "weight: expected dtype float32, bfloat16 or float16");
  check(weight.dim() == 2, "weight: expected 2 dimensions");
  const Tensor dense = torch::stable::contiguous(weight);
  const int64_t rows = weight.size(0);
  const int64_t columns = weight.size(1);
  Tensor bits = torch::stable::new_empty(weight, {rows, bitmask::bytes_per_row(columns)}, ScalarType::Byte);
  std::vector<int64_t> starts(static_cast<size_t>(rows));
  const int64_t count =
      bitmask_mark(dense.const_data_ptr(), dtype, rows, columns, byte_data(bits), starts.data(), torch_executor());
  Tensor values = torch::stable::new_empty(weight, {count});
  bitmask_gather(
      dense.const_data_ptr(), dtype, rows, columns, byte_data(bits), starts.data(), values.mutable_data_ptr(),
      torch_executor());
  return {values, bits};
}

Tensor bitmask_unpack_of(Tensor values, Tensor bitmask, int64_t features) {
  const DType dtype = dtype_of(values, "values: expected dtype float32, bfloat16 or float16");
  check(values.dim() == 1, "values: expected 1 dimension");
  check(
      features >= 0 && bitmask.dim() == 2 && bitmask.scalar_type() == ScalarType::Byte &&
          bitmask.size(1) == bitmask::bytes_per_row(features),
      "bitmask: expected uint8 [rows, ceil(features / 8)]");
  const Tensor dense_values = torch::stable::contiguous(values);
  const Tensor bits = torch::stable::contiguous(bitmask);
  Tensor weight = torch::stable::new_empty(values, {bitmask.size(0), features});
  bitmask_unpack(
      dense_values.const_data_ptr(), dtype, values.size(0), static_cast<const uint8_t*>(bits.const_data_ptr()),
      bitmask.size(0), features, weight.mutable_data_ptr(), torch_executor());
  return weight;
}

// Products with packed weights are called for every token, so what needs no copy goes through no dispatcher.
Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

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
    y = torch::stable::new_empty(x, shape);
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
    return linear.multiply_dense(rows, [&](void* weight) { bitmask_expand(packed, linear.dtype, linear.columns, weight, torch_executor()); });
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
    return linear.multiply_dense(rows, [&](void* weight) { nm_expand(packed, linear.dtype, linear.columns, weight, torch_executor()); });
  }
  nm_linear(
      linear.x.const_data_ptr(), linear.dtype, linear.tokens, linear.columns, packed, linear.bias_data(),
      linear.y.mutable_data_ptr(), torch_executor());
  return linear.y;
}

// A result, and the damping that the function which writes it returns.
template <class F>
std::tuple<Tensor, Tensor> with_damping_used(Tensor result, const Tensor& gram, const F& f) {
  Tensor damping_used = torch::stable::new_empty(gram, {}, ScalarType::Double);
  *static_cast<double*>(damping_used.mutable_data_ptr()) = f(float_data(result));
  return {result, damping_used};
}

std::tuple<Tensor, Tensor> reverse_cholesky_of(Tensor gram, double damping) {
  check_square_float(gram, "gram: expected a square float32 matrix");
  const Tensor dense = torch::stable::contiguous(gram);
  return with_damping_used(torch::stable::new_empty(gram, {gram.size(0), gram.size(1)}), gram, [&](float* factor) {
    return cpu::reverse_cholesky(const_float_data(dense), gram.size(0), damping, factor, torch_executor());
  });
}

std::tuple<Tensor, Tensor> gram_inverse_of(Tensor gram, double damping) {
  check_square_float(gram, "gram: expected a square float32 matrix");
  const Tensor dense = torch::stable::contiguous(gram);
  return with_damping_used(torch::stable::new_empty(gram, {gram.size(0), gram.size(1)}), gram, [&](float* inverse) {
    return gram_inverse(const_float_data(dense), gram.size(0), damping, inverse, torch_executor());
  });
}

std::tuple<Tensor, Tensor> gram_solve_of(Tensor gram, Tensor cross, double damping) {
  check_square_float(gram, "gram: expected a square float32 matrix");
  check(
      cross.dim() == 2 && cross.size(1) == gram.size(0) && cross.scalar_type() == ScalarType::Float,
      "cross: expected float32 [out_features, features] with the features of gram");
  const Tensor dense = torch::stable::contiguous(gram), dense_cross = torch::stable::contiguous(cross);
  return with_damping_used(torch::stable::new_empty(cross, {cross.size(0), cross.size(1)}), gram, [&](float* solution) {
    return gram_solve(
        const_float_data(dense), const_float_data(dense_cross), cross.size(0), cross.size(1), damping, solution, torch_executor());
  });
}

void check_like(const Tensor& tensor, const Tensor& weight, ScalarType type, const char* message) {
  check(
      tensor.dim() == 2 && tensor.size(0) == weight.size(0) && tensor.size(1) == weight.size(1) && tensor.scalar_type() == type, message);
}

Tensor admm_step(Tensor offset, Tensor dual, Tensor mask, Tensor weight, int64_t n, int64_t m, int64_t k, std::string scope) {
  check(weight.dim() == 2 && weight.scalar_type() == ScalarType::Float, "weight: expected 2 dimensions of float32");
  check_like(offset, weight, ScalarType::Float, "offset: expected float32 of the shape of weight");
  check_like(dual, weight, ScalarType::Float, "dual: expected float32 of the shape of weight");
  check_like(mask, weight, ScalarType::Bool, "mask: expected bool of the shape of weight");
  check(n == 0 || (n >= 1 && n < m && m <= 64 && weight.size(1) % m == 0), "n, m: expected 1 <= n < m <= 64 with columns divisible by m");
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

Solver solver_of(const std::string& name) {
  if (name == "auto") return Solver::automatic;
  if (name == "cholesky") return Solver::cholesky;
  check(name == "cg", "solver: expected auto, cholesky or cg");
  return Solver::conjugate_gradients;
}

std::tuple<Tensor, Tensor, Tensor> masked_lstsq_of(
    Tensor weight,
    Tensor gram,
    Tensor mask,
    std::optional<Tensor> start,
    double damping,
    double tolerance,
    int64_t max_iterations,
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
      static_cast<const uint8_t*>(dense_mask.const_data_ptr()), {damping, tolerance, max_iterations, solver_of(solver)}, rows, columns,
      new_weight.mutable_data_ptr(), float_data(row_error), torch_executor());
  return {new_weight, row_error, unfinished};
}

Scope scope_of(const std::string& name) {
  if (name == "block") return Scope::block;
  if (name == "row") return Scope::row;
  check(name == "matrix", "scope: expected block, row or matrix");
  return Scope::matrix;
}

std::tuple<Tensor, Tensor, Tensor> obs_sweep_of(
    Tensor weight,
    Tensor factor,
    int64_t n,
    int64_t m,
    double sparsity,
    std::string scope,
    int64_t block_size,
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
      {mask ? 0 : n, m, sparsity, scope_of(scope), block_size}, rows, columns, new_weight.mutable_data_ptr(),
      byte_data(chosen), float_data(row_error), torch_executor());
  return {new_weight, chosen, row_error};
}

Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  check(name == "gelu_tanh", "activation: expected relu, silu, gelu or gelu_tanh");
  return Activation::gelu_tanh;
}

// Contiguous tensors of one shape and dtype.
template <size_t kCount>
struct Alike {
  std::array<Tensor, kCount> tensors;
  DType dtype;

  explicit Alike(std::array<Tensor, kCount> given)
      : tensors(given), dtype(dtype_of(given[0], "activated: expected dtype float32, bfloat16 or float16")) {
    for (Tensor& tensor : tensors) {
      check(
          tensor.dim() == 2 && tensor.size(0) == given[0].size(0) && tensor.size(1) == given[0].size(1) &&
              tensor.scalar_type() == given[0].scalar_type(),
          "activated, up, gate, preactivation, start: expected one shape [tokens, features] and one dtype");
      tensor = torch::stable::contiguous(tensor);
    }
  }
  const void* data(size_t which) const { return tensors[which].const_data_ptr(); }
  Tensor new_one() const { return torch::stable::new_empty(tensors[0], {tensors[0].size(0), tensors[0].size(1)}); }
};

Tensor plain_split_of(Tensor activated, Tensor preactivation, Tensor start, std::string activation, double ratio, int64_t steps) {
  const Alike<3> in({activated, preactivation, start});
  Tensor z = in.new_one();
  plain_split(
      in.data(0), in.data(1), in.data(2), in.dtype, activated.numel(), activation_of(activation), static_cast<float>(ratio),
      steps, z.mutable_data_ptr(), torch_executor());
  return z;
}

std::tuple<Tensor, Tensor> gated_split_of(
    Tensor activated, Tensor up, Tensor gate, Tensor start, std::string activation, double ratio, int64_t steps) {
  const Alike<4> in({activated, up, gate, start});
  Tensor z = in.new_one(), s = in.new_one();
  gated_split(
      in.data(0), in.data(1), in.data(2), in.data(3), in.dtype, activated.numel(), activation_of(activation),
      static_cast<float>(ratio), steps, z.mutable_data_ptr(), s.mutable_data_ptr(), torch_executor());
  return {z, s};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("admm_step_", TORCH_BOX(&admm_step));
  m.impl("bitmask_linear", TORCH_BOX(&bitmask_linear_of));
  m.impl("bitmask_pack", TORCH_BOX(&bitmask_pack_of));
  m.impl("bitmask_unpack", TORCH_BOX(&bitmask_unpack_of));
  m.impl("feature_norm_", TORCH_BOX(&feature_norm));
  m.impl("gated_split", TORCH_BOX(&gated_split_of));
  m.impl("gram_", TORCH_BOX(&gram));
  m.impl("gram_inverse", TORCH_BOX(&gram_inverse_of));
  m.impl("gram_solve", TORCH_BOX(&gram_solve_of));
  m.impl("gram_symmetrize_", TORCH_BOX(&gram_symmetrize));
  m.impl("masked_lstsq", TORCH_BOX(&masked_lstsq_of));
  m.impl("nm_linear", TORCH_BOX(&nm_linear_of));
  m.impl("nm_mask", TORCH_BOX(&nm_mask_of));
  m.impl("nm_pack", TORCH_BOX(&nm_pack_of));
  m.impl("nm_prune_pack", TORCH_BOX(&nm_prune_pack_of));
  m.impl("nm_unpack", TORCH_BOX(&nm_unpack_of));
  m.impl("obs_sweep", TORCH_BOX(&obs_sweep_of));
  m.impl("plain_split", TORCH_BOX(&plain_split_of));
  m.impl("reverse_cholesky", TORCH_BOX(&reverse_cholesky_of));
  m.impl("topk_mask", TORCH_BOX(&topk_mask_of));
}

}  // namespace sparsekern::cpu
