// All CPU kernels: torch-free, on raw pointers to contiguous row-major data. One file per op implements each; its <op>_op.cpp turns
// tensors into these arguments. Kernels throw std::invalid_argument (ValueError in Python) on values they refuse.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/nm_q4.h"
#include "common/semi_structured.h"
#include "cpu/activation.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace sparsekern::cpu {

void gram_(
    float* gram, const void* x, DType dtype, int64_t tokens, int64_t features,
    const uint8_t* row_mask,  // null: every token is included
    float alpha, const Executor& executor);

void gram_symmetrize_(float* gram, int64_t features, const Executor& executor);

void feature_norm_(
    float* sum_squares,
    float* sum,  // null: not computed
    const void* x, DType dtype, int64_t tokens, int64_t features,
    const uint8_t* row_mask,  // null: every token is included
    const Executor& executor);

// Masks are bytes, 1 where kept. `columns` is divisible by m, m at most 64.
void nm_mask(
    const void* scores, DType dtype, int64_t rows, int64_t columns, int64_t n, int64_t m, uint8_t* mask, const Executor& executor);

// k is at most `columns`, or at most `rows * columns` for the whole matrix.
void topk_mask(
    const void* scores, DType dtype, int64_t rows, int64_t columns, int64_t k, bool whole_matrix, uint8_t* mask,
    const Executor& executor);

// The layout of common/semi_structured.h; shapes are multiples of its format's.
void semi_structured_pack(
    const void* weight, semi_structured::Type type, int64_t rows, int64_t columns, void* values, void* meta,
    const Executor& executor);
// Keeps as many weights of each group as fit the layout, the largest by `scores`. int8 weights are not supported.
void semi_structured_prune_pack(
    const void* weight, DType dtype,
    const void* scores,  // null: the magnitudes of the weight
    DType scores_dtype, int64_t rows, int64_t columns, void* values, void* meta, const Executor& executor);
void semi_structured_unpack(
    const void* values, const void* meta, int element_size, int64_t rows,
    int64_t columns,  // columns of the weight
    void* weight, const Executor& executor);

// Packed weights in the layouts of common/packed_rows.h. Neither product reads outside its arguments, whatever they hold.
struct BitmaskRows {
  const void* values;
  int64_t value_count;  // whole slots, including packed_rows::kSlack spare ones
  const uint64_t* bits;
  const int64_t* starts;  // in slots, [tiles + 1]
  const int32_t* order;
  int64_t rows;
};
struct NmRows {
  const void* values;
  const uint32_t* codes;
  int64_t rows, n, m;
};
constexpr int64_t kFewTokens = 32;  // most tokens for which packed weights are expanded in registers
void bitmask_linear(
    const void* x, DType dtype, int64_t tokens, int64_t columns, const BitmaskRows& packed,
    const void* bias,  // null: none
    void* y, const Executor& executor);
void nm_linear(
    const void* x, DType dtype, int64_t tokens, int64_t columns, const NmRows& packed,
    const void* bias,  // null: none
    void* y, const Executor& executor);

// N:M weights with 4-bit values, in blocks of common/nm_q4.h, whatever they hold.
struct NmQ4Rows {
  const uint8_t* blocks;
  int64_t rows;
  nm_q4::Layout layout;
};
constexpr int64_t kFewQ4Tokens = 16;  // most tokens that are multiplied by packed blocks
void nm_q4_linear(
    const void* x, DType dtype, int64_t tokens, int64_t columns, const NmQ4Rows& packed,
    const void* bias,  // null: none
    void* y, const Executor& executor);
// Rounds each weight to the nearest multiple of its scale, [rows, blocks] float16; throws unless all are finite and the rounded
// weight is N:M.
void nm_q4_pack(
    const void* weight, DType dtype, const void* scales, int64_t rows, int64_t columns, const nm_q4::Layout& layout,
    uint8_t* blocks, const Executor& executor);
// Writes the dense weight and its scales; throws unless the blocks are what packing makes.
void nm_q4_unpack(const NmQ4Rows& packed, int64_t columns, float* weight, void* scales, const Executor& executor);

// A weight of 8-bit values, [rows, columns], and the factor of each row.
struct Int8Rows {
  const int8_t* values;
  const float* scales;
  int64_t rows;
};
void int8_linear(
    const void* x, DType dtype, int64_t tokens, int64_t columns, const Int8Rows& packed,
    const void* bias,  // null: none
    void* y, const Executor& executor);

// The experts of each token, [tokens, choices]. Packed weights of experts are stored one after another: those of the first one are given,
// with its rows; values of a bitmask are shared.
struct ExpertChoice {
  const int64_t* ids;
  int64_t tokens, choices, experts;
};
// Write y, [tokens, choices, rows]; throw on an id of no expert.
void bitmask_experts_linear(
    const void* x, DType dtype, int64_t columns, const ExpertChoice& choice, const BitmaskRows& packed,
    const void* bias,  // [experts, rows]; null: none
    void* y, const Executor& executor);
void nm_experts_linear(
    const void* x, DType dtype, int64_t columns, const ExpertChoice& choice, const NmRows& packed,
    const void* bias,  // [experts, rows]; null: none
    void* y, const Executor& executor);

// Write the dense weight of tensors that may contradict each other; only what they write is checked.
void bitmask_expand(const BitmaskRows& packed, DType dtype, int64_t columns, void* weight, const Executor& executor);
void nm_expand(const NmRows& packed, DType dtype, int64_t columns, void* weight, const Executor& executor);

// bitmask_pack in two steps, because the number of values is known only after the first.
struct BitmaskPlan {
  int64_t columns;
  std::vector<int64_t> counts;  // non-zeros of each stored row
  std::vector<int64_t> starts;  // as in BitmaskRows; the last one is the number of slots without the slack
  std::vector<int32_t> order;

  BitmaskPlan(const void* weight, DType dtype, int64_t rows, int64_t columns, const Executor& executor);
};
void bitmask_pack(const BitmaskPlan& plan, const void* weight, DType dtype, void* values, uint64_t* bits, const Executor& executor);
// Throws if a group has more than n non-zeros; 1 <= n < m <= 16, and m divides `columns`.
void nm_pack(
    const void* weight, DType dtype, int64_t rows, int64_t columns, int64_t n, int64_t m, void* values, uint32_t* codes,
    const Executor& executor);
// Write the dense weight; throw unless the tensors are what packing makes.
void bitmask_unpack(const BitmaskRows& packed, DType dtype, int64_t columns, void* weight, const Executor& executor);
void nm_unpack(const NmRows& packed, DType dtype, int64_t columns, void* weight, const Executor& executor);

enum class Solver { automatic, cholesky, conjugate_gradients };

struct LeastSquares {
  double damping, tolerance;
  int64_t max_iterations;
  Solver solver;

  // Returns whether rows of this support are factored.
  bool exact(int64_t support, int64_t columns) const;
};

// `start` may be null (the weight itself). Returns the number of rows that conjugate gradients left unfinished.
int64_t masked_lstsq(
    const void* weight, const void* start, DType dtype, const float* gram, const uint8_t* mask, const LeastSquares& settings,
    int64_t rows, int64_t columns, void* new_weight, float* row_error, const Executor& executor);

struct StepPattern {
  int64_t n, m;  // n = 0: the k largest
  int64_t k;     // of each row, or of the whole matrix
  bool whole_matrix;
};

// Updates offset, dual and mask in place and returns the number of changed entries of the mask. `columns` is divisible by m, and m
// is at most 64. k is at most `columns`, or `rows * columns` for the whole matrix.
int64_t admm_step_(
    float* offset, float* dual, uint8_t* mask, const float* weight, const StepPattern& pattern, int64_t rows, int64_t columns,
    const Executor& executor);

struct AdamTensors {
  float* weight;
  const void* grad;
  DType grad_dtype;
  float *exp_avg, *exp_avg_sq;
  const uint8_t* mask;  // null: every weight is kept
  const float* anchor;  // null: no proximal term
  void* half;           // null: no copy
  DType half_dtype;
};
struct AdamStep {
  float beta1, rest1, beta2, rest2;  // rest: 1 - beta
  float decay;                       // factor of the weight
  float rate, root_scale;            // the learning rate and the root's factor, both corrected for the step
  float eps, grad_scale, pull;
};
// `columns` only names places in errors.
void masked_adamw_(const AdamTensors& tensors, const AdamStep& step, int64_t count, int64_t columns, const Executor& executor);

// Hidden states [tokens, features], and the head [vocabulary, features] that makes their logits, both of one dtype.
struct Logits {
  const void *x, *head;
  DType dtype;
  int64_t features;
};
// Writes KL(teacher || student) of each token and its gradient, [tokens, features] of the student. Logits are divided by `temperature`.
void linear_kl(
    const Logits& student, const Logits& teacher, int64_t tokens, int64_t vocabulary, double temperature, float* kl, float* grad,
    const Executor& executor);

// Writes V and returns the damping used; a negative value (or -inf for 0) says that float64 arithmetic was needed. A pivot counts
// as not positive below `smallest_pivot` of its entry of the damped diagonal, in units of the arithmetic's epsilon.
double reverse_cholesky(
    const float* gram, int64_t features, double damping, float* factor, const Executor& executor, double smallest_pivot = 0.0);

// Solves solution (gram + shift I) = cross; returns the damping as reverse_cholesky does.
double gram_solve(
    const float* gram, const float* cross, int64_t rows, int64_t columns, double damping, float* solution,
    const Executor& executor);

// Writes the symmetric (gram + shift I)^-1, with rows and columns of zeros for dead features; returns the damping as
// reverse_cholesky does.
double gram_inverse(const float* gram, int64_t columns, double damping, float* inverse, const Executor& executor);

// The part of the weight in which the exact number of pruned weights is counted.
enum class Scope { block, row, matrix };

struct SweepPattern {
  int64_t n, m;  // n = 0: a sparsity
  double sparsity;
  Scope scope;
  int64_t block_size;
};

// Throws if m does not divide the columns, or is above 64.
void require_whole_groups(const SweepPattern& pattern, int64_t columns);

// Throws as require_whole_groups does. A diagonal entry of the factor with a sign bit marks a dead feature.
void obs_sweep(
    const void* weight, DType dtype, const float* factor,
    const uint8_t* mask,  // null: chosen by the pattern
    const SweepPattern& pattern, int64_t rows, int64_t columns, void* new_weight, uint8_t* new_mask, float* row_error,
    const Executor& executor);

// The sweep with a fixed mask that rounds each kept weight to the nearest of -8 to 7 times its scale, [rows, blocks of 64 columns] float16.
void obs_quantize(
    const float* weight, const float* factor, const uint8_t* mask, const void* scales, int64_t rows, int64_t columns,
    float* new_weight, float* row_error, const Executor& executor);

// Writes the best of 24 scales of each row and 64 columns, [rows, blocks] float16; throws unless all values are finite and the weights fit.
void q4_scales(const float* weight, const float* importance, int64_t rows, int64_t columns, void* scales, const Executor& executor);

// Lowers the error of kept weights on their grids, one weight at a time. `residual` is (weight - target) H, with the symmetric `hessian` H.
void quantize_descent_(
    float* weight, float* residual, const float* hessian, const uint8_t* mask, const void* scales, int64_t rows, int64_t columns,
    int64_t passes, const Executor& executor);

// The arguments of the splits of SparseLLM (cpu/split.h): arrays of `entries` elements of `dtype`.
struct SplitProblem {
  const void* activated;
  const void* up;    // null if the network has no gate
  const void* gate;  // the pre-activation if the network has no gate
  const void* start;
  DType dtype;
  int64_t entries;
  Activation activation;
  float ratio;  // above 0
  int64_t steps;
};

void plain_split(const SplitProblem& problem, void* z, const Executor& executor);
void gated_split(const SplitProblem& problem, void* z, void* s, const Executor& executor);

}  // namespace sparsekern::cpu
