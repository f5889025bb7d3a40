// nm_experts_linear: the product of tokens with the packed N:M weights of their experts.
//
// Floor for one token with k experts: the packed bytes of these k, 9/16 of the dense ones for 2:4 16-bit values. One call reads all of
// them in one parallel region; the kernels are those of nm_linear. Rows of x are sorted by expert and become floats once, so that each
// expert is read once for up to 8 of its tokens.
#include <type_traits>

#include "cpu/experts_product.h"
#include "cpu/kernels.h"
#include "cpu/nm_weight.h"

namespace sparsekern::cpu {

namespace {

template <class T>
NmRows rows_of(const NmRows& packed, int64_t expert, int64_t columns) {
  const int64_t stored = packed_rows::stored_per_row(columns, packed.n, packed.m, sizeof(T));
  NmRows own = packed;
  own.values = static_cast<const T*>(packed.values) + expert * packed.rows * stored;
  own.codes += expert * packed.rows * (stored * packed_rows::code_bits(packed.m) / 32);
  return own;
}

}  // namespace

void nm_experts_linear(
    const void* x, DType dtype, int64_t columns, const ExpertChoice& choice, const NmRows& packed, const void* bias, void* y,
    const Executor& executor) {
  const Pairs pairs(choice);
  check_codes(dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return experts_product(
        static_cast<const T*>(x), choice, columns, pairs, static_cast<const T*>(bias), static_cast<T*>(y), executor,
        [&](int64_t expert) { return NmWeight<T>(rows_of<T>(packed, expert, columns), columns); },
        [](int64_t) { return static_cast<const int32_t*>(nullptr); });
  }));
}

}  // namespace sparsekern::cpu
