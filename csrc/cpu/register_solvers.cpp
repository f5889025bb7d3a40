// Registers the ops that solve for weights and auxiliary activations.
#include <array>
#include <string>
#include <tuple>

#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

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

Tensor admm_step(Tensor offset, Tensor dual, Tensor mask, Tensor weight, int64_t n, int64_t m, int64_t k, std::string scope) {
  check(weight.dim() == 2 && weight.scalar_type() == ScalarType::Float, "weight: expected 2 dimensions of float32");
  check_like(offset, weight, ScalarType::Float, "offset: expected float32 of the shape of weight");
  check_like(dual, weight, ScalarType::Float, "dual: expected float32 of the shape of weight");
  check_like(mask, weight, ScalarType::Bool, "mask: expected bool of the shape of weight");
  check(
      n == 0 || (n >= 1 && n < m && m <= 64 && weight.size(1) % m == 0),
      "n, m: expected 1 <= n < m <= 64 with columns divisible by m");
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
  const SplitProblem problem{in.data(0),
                             nullptr,
                             in.data(1),
                             in.data(2),
                             in.dtype,
                             activated.numel(),
                             activation_of(activation),
                             static_cast<float>(ratio),
                             steps};
  plain_split(problem, z.mutable_data_ptr(), torch_executor());
  return z;
}

std::tuple<Tensor, Tensor> gated_split_of(
    Tensor activated, Tensor up, Tensor gate, Tensor start, std::string activation, double ratio, int64_t steps) {
  const Alike<4> in({activated, up, gate, start});
  Tensor z = in.new_one(), s = in.new_one();
  const SplitProblem problem{in.data(0),
                             in.data(1),
                             in.data(2),
                             in.data(3),
                             in.dtype,
                             activated.numel(),
                             activation_of(activation),
                             static_cast<float>(ratio),
                             steps};
  gated_split(problem, z.mutable_data_ptr(), s.mutable_data_ptr(), torch_executor());
  return {z, s};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) {
  m.impl("admm_step_", TORCH_BOX(&admm_step));
  m.impl("gated_split", TORCH_BOX(&gated_split_of));
  m.impl("gram_inverse", TORCH_BOX(&gram_inverse_of));
  m.impl("gram_solve", TORCH_BOX(&gram_solve_of));
  m.impl("masked_lstsq", TORCH_BOX(&masked_lstsq_of));
  m.impl("obs_sweep", TORCH_BOX(&obs_sweep_of));
  m.impl("plain_split", TORCH_BOX(&plain_split_of));
  m.impl("reverse_cholesky", TORCH_BOX(&reverse_cholesky_of));
}

}  // namespace sparsekern::cpu
