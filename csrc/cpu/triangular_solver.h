// Solves with the factor V of reverse_cholesky for the rows of a matrix in panels.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/panel_matrix.h"

namespace sparsekern::cpu {

// A pivot of the factorisation below this many epsilons of its diagonal entry is rounding error, which would dominate a solution.
constexpr double kResolvedPivot = 32.0;

class TriangularSolver {
 public:
  // V: row-major [columns, columns], upper triangular. A diagonal entry with a sign bit marks a dead feature; its column of every
  // solution is zero.
  TriangularSolver(const float* factor, int64_t columns, const Executor& executor);

  // X := X (V V^T)^-1, in place. With `lower_only`, reads and computes only the entries on and left of the diagonal of X, and the
  // columns up to the next multiple of 48. The rows must be zero right of the diagonal, and the result symmetric.
  void solve(PanelMatrix& x, bool lower_only = false) const;

 private:
  struct Block;
  enum class Side { transposed, plain };  // V^T is solved from the last column to the first, V from the first to the last

  const float* at(int64_t row, int64_t column) const { return factor_ + row * columns_ + column; }
  Multiplier connection(Side side, int64_t from, int64_t to, int64_t begin, int64_t end) const;
  std::vector<Block> blocks_of(Side side, int64_t span_begin, int64_t span_end) const;
  void divide_span(PanelMatrix& x, Side side, int64_t begin, bool lower_only) const;
  void divide_block(const PanelMatrix& x, const Block& block, int64_t limit, int64_t panel, int64_t panels) const;

  const float* factor_;
  int64_t columns_;
  const Executor& executor_;
  MultiplyAdd multiply_add_ = choose_multiply_add();
  std::vector<std::vector<float>> inverses_;  // inverses of the triangles on the diagonal
};

}  // namespace sparsekern::cpu
