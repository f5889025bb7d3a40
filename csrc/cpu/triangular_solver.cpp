// X (V V^T)^-1 as Y V^T = X from the last column to the first, then X V = Y from the first to the last.
//
// Floor: rows * columns^2 / 2 multiply-adds for each of the two, together as many as a product with the inverse (a third of that
// for the inverse itself). Rows go through in the lanes of panels. Nearly all work is a column's sum over the columns solved before
// it, a product of panels. The triangle of a block of columns is inverted once, so that the rest is also a product.
#include "cpu/triangular_solver.h"

#include <algorithm>
#include <cmath>

namespace sparsekern::cpu {

namespace {

constexpr int64_t kSpan =
    512;  // columns whose sums over all earlier spans are computed together; decides how often X is read from memory
constexpr int64_t kBlock = 64;  // columns solved by the inverse of their triangle

// Returns the inverse of an upper triangle, row-major, zero below the diagonal and in the rows and columns of dead features.
std::vector<float> invert(const float* corner, int64_t stride, int64_t size) {
  std::vector<float> inverse(static_cast<size_t>(size * size), 0.0f);
  std::vector<double> pending(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) {
    std::fill(pending.begin(), pending.end(), 0.0);
    pending[i] = 1.0;
    for (int64_t k = i; k < size; ++k) {
      const float* row = corner + k * stride;
      const double value = std::signbit(row[k]) ? 0.0 : pending[k] / row[k];
      inverse[i * size + k] = static_cast<float>(value);
      for (int64_t j = k + 1; j < size; ++j) pending[j] -= value * row[j];
    }
  }
  return inverse;
}

}  // namespace

// Columns [begin, begin + inverse.outputs). The columns from `from` on, which are solved before them, are subtracted first.
struct TriangularSolver::Block {
  int64_t begin, from;
  Multiplier solved, inverse;
};

TriangularSolver::TriangularSolver(const float* factor, int64_t columns, const Executor& executor)
    : factor_(factor), columns_(columns), executor_(executor), inverses_(static_cast<size_t>(ceil_div(columns, kBlock))) {
  parallel_tasks(executor, ceil_div(columns, kBlock), [&](int64_t i) {
    inverses_[static_cast<size_t>(i)] = invert(at(i * kBlock, i * kBlock), columns, std::min(kBlock, columns - i * kBlock));
  });
}

void TriangularSolver::solve(PanelMatrix& x, bool lower_only) const {
  const int64_t spans = ceil_div(columns_, kSpan);
  for (int64_t i = spans - 1; i >= 0; --i) divide_span(x, Side::transposed, i * kSpan, lower_only);
  for (int64_t i = 0; i < spans; ++i) divide_span(x, Side::plain, i * kSpan, lower_only);
}

// Returns the entries of V that connect the columns [begin, end) with the columns [from, to), which are solved before them.
Multiplier TriangularSolver::connection(Side side, int64_t from, int64_t to, int64_t begin, int64_t end) const {
  return side == Side::transposed ? load_multiplier_transposed(at(begin, from), columns_, to - from, end - begin, executor_)
                                  : load_multiplier(at(from, begin), columns_, to - from, end - begin, executor_);
}

// Returns the blocks of a span in the order in which they are solved.
std::vector<TriangularSolver::Block> TriangularSolver::blocks_of(Side side, int64_t span_begin, int64_t span_end) const {
  std::vector<Block> blocks;
  const bool transposed = side == Side::transposed;
  const int64_t count = ceil_div(span_end - span_begin, kBlock);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = span_begin + (transposed ? count - 1 - i : i) * kBlock;
    const int64_t end = std::min(begin + kBlock, span_end);
    const int64_t from = transposed ? end : span_begin, to = transposed ? span_end : begin;
    const auto load = transposed ? &load_multiplier_transposed : &load_multiplier;
    const float* inverse = inverses_[static_cast<size_t>(begin / kBlock)].data();
    blocks.push_back(
        {begin, from, connection(side, from, to, begin, end), load(inverse, end - begin, end - begin, end - begin, executor_)});
  }
  return blocks;
}

void TriangularSolver::divide_span(PanelMatrix& x, Side side, int64_t begin, bool lower_only) const {
  const int64_t end = std::min(begin + kSpan, columns_);
  const int64_t from = side == Side::transposed ? end : 0, to = side == Side::transposed ? columns_ : begin;
  const Multiplier solved = connection(side, from, to, begin, end);
  const std::vector<Block> blocks = blocks_of(side, begin, end);
  for_each_tile(x.panels(), executor_, [&](int64_t panel, int64_t panels) {
    const int64_t limit = lower_only ? std::min((panel + panels) * kLanes, columns_) : columns_;
    if (limit <= begin) return;
    multiply_add_(
        solved, std::clamp<int64_t>(limit - from, 0, to - from), std::min(limit, end) - begin, -1.0f, x.at(panel, from), x.stride(),
        x.at(panel, begin), x.stride(), panels);
    for (const Block& block : blocks) {
      if (block.begin < limit) divide_block(x, block, limit, panel, panels);
    }
  });
}

void TriangularSolver::divide_block(const PanelMatrix& x, const Block& block, int64_t limit, int64_t panel, int64_t panels) const {
  alignas(64) float pending[kTilePanels * kBlock * kLanes];
  constexpr int64_t kPendingStride = kBlock * kLanes;
  const int64_t size = std::min(block.inverse.outputs, limit - block.begin);
  const int64_t units = std::clamp<int64_t>(limit - block.from, 0, block.solved.units);
  float* columns = x.at(panel, block.begin);
  multiply_add_(block.solved, units, size, -1.0f, x.at(panel, block.from), x.stride(), columns, x.stride(), panels);
  for (int64_t p = 0; p < panels; ++p) {
    std::copy_n(columns + p * x.stride(), size * kLanes, pending + p * kPendingStride);
    std::fill_n(columns + p * x.stride(), size * kLanes, 0.0f);
  }
  multiply_add_(block.inverse, size, size, 1.0f, pending, kPendingStride, columns, x.stride(), panels);
}

}  // namespace sparsekern::cpu
