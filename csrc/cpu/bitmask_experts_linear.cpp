// bitmask_experts_linear: the product of tokens with the packed weights of their experts.
//
// Floor for one token with k experts: the packed bytes of these k, rows * columns * (2 d + 1/8) each for 16-bit values with a share d
// of non-zeros. One call reads all of them in one parallel region; the kernels are those of bitmask_linear. Rows of x are sorted by
// expert and become floats once, so that each expert is read once for up to 8 of its tokens.
#include <type_traits>

#include "cpu/bitmask_weight.h"
#include "cpu/experts_product.h"
#include "cpu/kernels.h"

namespace sparsekern::cpu {

namespace {

BitmaskRows rows_of(const BitmaskRows& packed, int64_t expert, int64_t columns) {
  BitmaskRows own = packed;
  own.bits += expert * packed.rows * packed_rows::words(columns);
  own.starts += expert * (packed_rows::tiles(packed.rows) + 1);
  own.order += expert * packed.rows;
  return own;
}

}  // namespace

void bitmask_experts_linear(
    const void* x, DType dtype, int64_t columns, const ExpertChoice& choice, const BitmaskRows& packed, const void* bias, void* y,
    const Executor& executor) {
  const Pairs pairs(choice);
  for (int64_t expert = 0; expert < choice.experts; ++expert) {
    if (pairs.count(expert) > 0) check_places(rows_of(packed, expert, columns), dtype);
  }
  check_bits(dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return experts_product(
        static_cast<const T*>(x), choice, columns, pairs, static_cast<const T*>(bias), static_cast<T*>(y), executor,
        [&](int64_t expert) { return BitmaskWeight<T>(rows_of(packed, expert, columns), columns); },
        [&](int64_t expert) { return packed.order + expert * packed.rows; });
  }));
}

}  // namespace sparsekern::cpu
