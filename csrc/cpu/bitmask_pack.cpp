// bitmask_pack: packs a weight as its non-zeros and one bit per weight (common/packed_rows.h).
//
// Floor: two reads of the weight and one write of the values and bits, rows * columns * (2 + 2 + 2 d + 1/8) bytes for 16-bit values
// with a share d of non-zeros. The weight is read twice because the number of slots and the order of the rows are known only after
// the first pass, which counts in vectors. The second pass marks a word of 64 columns in vectors and moves its values one by one,
// in about two cycles each.
#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/row_bits.h"

namespace sparsekern::cpu {

namespace {

constexpr int64_t kCounted = 4096;  // columns whose count fits in 16-bit lanes

template <class Bits>
SPARSEKERN_INLINE int64_t count_row(const Bits* row, int64_t columns) {
  int64_t set = 0;
  for (int64_t first = 0; first < columns; first += kCounted) {
    const int64_t end = std::min(columns, first + kCounted);
    uint16_t some = 0;
    for (int64_t j = first; j < end; ++j) some = static_cast<uint16_t>(some + ((row[j] & kMagnitude<Bits>) != 0));
    set += some;
  }
  return set;
}

// Writes a row's bits, and its values at a distance of `kLanes` elements.
template <class Bits>
SPARSEKERN_INLINE void pack_row(const Bits* row, int64_t columns, uint64_t* words, Bits* values) {
  constexpr int64_t lanes = packed_rows::lanes(sizeof(Bits));
  mark_row(row, columns, words);
  for (int64_t first = 0; first < columns; first += packed_rows::kWordColumns) {
    for (uint64_t left = *words++; left != 0; left &= left - 1) {
      *values = row[first + __builtin_ctzll(left)];
      values += lanes;
    }
  }
}

int64_t grain(int64_t columns) { return 1 + 16384 / (columns + 1); }

template <class Bits>
void count_rows(const Bits* weight, int64_t rows, int64_t columns, int64_t* counts, const Executor& executor) {
  const auto count = Entries<&count_row<Bits>>::choose();
  parallel_for(executor, rows, grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) counts[row] = count(weight + row * columns, columns);
  });
}

template <class Bits>
void pack_tiles(const BitmaskPlan& plan, const Bits* weight, Bits* values, uint64_t* bits, const Executor& executor) {
  constexpr int64_t lanes = packed_rows::lanes(sizeof(Bits));
  const auto pack = Entries<&pack_row<Bits>>::choose();
  const int64_t rows = static_cast<int64_t>(plan.order.size()), words = packed_rows::words(plan.columns);
  parallel_for(executor, packed_rows::tiles(rows), grain(plan.columns * packed_rows::kTileRows), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      Bits* group = values + plan.starts[tile] * lanes;
      const int64_t last = std::min(rows, (tile + 1) * packed_rows::kTileRows);
      for (int64_t first = tile * packed_rows::kTileRows; first < last; first += lanes) {
        const int64_t longest = plan.counts[std::min(first + lanes, last) - 1];  // rows are sorted
        for (int64_t lane = 0; lane < lanes; ++lane) {
          int64_t count = 0;
          if (first + lane < last) {
            count = plan.counts[first + lane];
            pack(weight + plan.order[first + lane] * plan.columns, plan.columns, bits + (first + lane) * words, group + lane);
          }
          for (int64_t k = count; k < longest; ++k) group[k * lanes + lane] = Bits{0};
        }
        group += longest * lanes;
      }
    }
  });
  std::fill_n(values + plan.starts.back() * lanes, packed_rows::kSlack * lanes, Bits{0});
}

}  // namespace

BitmaskPlan::BitmaskPlan(const void* weight, DType dtype, int64_t rows, int64_t columns_, const Executor& executor)
    : columns(columns_),
      counts(static_cast<size_t>(rows)),
      starts(static_cast<size_t>(packed_rows::tiles(rows)) + 1),
      order(static_cast<size_t>(rows)) {
  std::vector<int64_t> unsorted(counts.size());
  if (size_of(dtype) == 4) {
    count_rows(static_cast<const uint32_t*>(weight), rows, columns, unsorted.data(), executor);
  } else {
    count_rows(static_cast<const uint16_t*>(weight), rows, columns, unsorted.data(), executor);
  }
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return unsorted[a] < unsorted[b]; });
  std::transform(order.begin(), order.end(), counts.begin(), [&](int32_t row) { return unsorted[row]; });
  int64_t slots = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (row % packed_rows::kTileRows == 0) starts[row / packed_rows::kTileRows] = slots;
    const bool ends_group = (row + 1) % packed_rows::lanes(size_of(dtype)) == 0 || row + 1 == rows;
    if (ends_group) slots += counts[row];
  }
  starts.back() = slots;
}

void bitmask_pack(
    const BitmaskPlan& plan, const void* weight, DType dtype, void* values, uint64_t* bits, const Executor& executor) {
  if (size_of(dtype) == 4) {
    pack_tiles(plan, static_cast<const uint32_t*>(weight), static_cast<uint32_t*>(values), bits, executor);
  } else {
    pack_tiles(plan, static_cast<const uint16_t*>(weight), static_cast<uint16_t*>(values), bits, executor);
  }
}

}  // namespace sparsekern::cpu
