// nm_linear: x W^T + b from the kept values of an N:M weight and their positions.
//
// Floor for one token: the packed bytes. A row of 2:4 16-bit values takes columns * (1 + 1/8) bytes, 9/16 of the time to read the
// dense weight. Values are not spread to their columns; their factors are gathered from x. A block holds the values of 32 columns
// for each half of its slots. With AVX-512, one vpermt2ps of two registers of x then gives the factors of 16 values. The positions
// come from one word by shifts, one register each. 64 columns take about 5 cycles, less than reading them from memory. The same
// holds for 1:2, 4:8 and 8:16; other patterns gather x with vector gathers. AVX2 multiplies eight rows together, for any pattern without
// a gather (nm_multiply_avx2.h).
//
// A few tokens share values and positions; many tokens are a dense product (packed_linear.h).
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/nm_weight.h"
#include "cpu/packed_linear.h"

namespace sparsekern::cpu {

namespace {

template <class T>
bool multiply(
    const NmRows& packed, const void* x, int64_t tokens, int64_t columns, const void* bias, void* y, const Executor& executor) {
  const NmWeight<T> weight(packed, columns);
  const Activations activations(static_cast<const T*>(x), tokens, columns, weight.isa, executor);
  const Output<T> output{static_cast<T*>(y), packed.rows, nullptr, static_cast<const T*>(bias)};
  return packed_product(weight, activations.block(), output, executor);
}

}  // namespace

void nm_linear(
    const void* x, DType dtype, int64_t tokens, int64_t columns, const NmRows& packed, const void* bias, void* y,
    const Executor& executor) {
  check_codes(dispatch_dtype(dtype, [&](auto* type) {
    return multiply<std::remove_pointer_t<decltype(type)>>(packed, x, tokens, columns, bias, y, executor);
  }));
}

void nm_expand(const NmRows& packed, DType dtype, int64_t columns, void* weight, const Executor& executor) {
  check_codes(dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return expand_all(NmWeight<T>(packed, columns), static_cast<T*>(weight), executor);
  }));
}

}  // namespace sparsekern::cpu
