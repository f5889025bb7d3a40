// bitmask_linear: x W^T + b from the non-zeros of W and one bit per weight.
//
// Floor for one token: the packed bytes, rows * columns * (2 d + 1/8) for 16-bit values with a share d of non-zeros. At d = 1/2
// that is 9/16 of the time to read the dense weight.
//
// Arithmetic comes next. An AVX-512 core without VBMI2 spreads 16 values of 4 bytes (vpexpandd) in two cycles of its only shuffle
// port; expanding the mask takes a third. 16 weights therefore take at least 3 cycles for any d: 32 GB/s of dense bf16 weights at 3
// GHz. Hence the layout: two rows share a slot of 4 bytes. Their 16-bit values become floats by a shift and a mask, without a
// shuffle, and both are multiplied by the same x. Nothing else uses the shuffle port. Values and bits of two tiles at a time are
// read in order and prefetched 4 KiB ahead.
//
// AVX2 has no expansion. A load of 8 slots is spread to 8 columns by vpermd. Its places come from a table of 2 KiB, by the byte of bits,
// as bytes that also make the mask. For one token, 8 weights take 10 instructions (11 of float32): the bits, their number, the next
// slots, the load, its shift to floats, the places, the permutation, the mask, the multiply-add, and half a load of x. A Zen 3 at 3.24
// GHz does 10.6 G weights a second on a core, and 9.9 from memory, for any share of zeros: at 50 % that is 11 GB/s a core, and near the
// bound of the memory; at 70 % the instructions are the bound.
//
// A few tokens share the expanded registers. Many tokens are a dense product of panels (packed_linear.h), bound by arithmetic.
#include <type_traits>

#include "cpu/bitmask_weight.h"
#include "cpu/kernels.h"
#include "cpu/packed_linear.h"

namespace sparsekern::cpu {

namespace {

template <class T>
bool multiply(
    const BitmaskRows& packed, const void* x, int64_t tokens, int64_t columns, const void* bias, void* y,
    const Executor& executor) {
  const BitmaskWeight<T> weight(packed, columns);
  const Activations activations(static_cast<const T*>(x), tokens, columns, weight.isa, executor);
  const Output<T> output{static_cast<T*>(y), packed.rows, packed.order, static_cast<const T*>(bias)};
  return packed_product(weight, activations.block(), output, executor);
}

}  // namespace

void bitmask_linear(
    const void* x, DType dtype, int64_t tokens, int64_t columns, const BitmaskRows& packed, const void* bias, void* y,
    const Executor& executor) {
  check_places(packed, dtype);
  check_bits(dispatch_dtype(dtype, [&](auto* type) {
    return multiply<std::remove_pointer_t<decltype(type)>>(packed, x, tokens, columns, bias, y, executor);
  }));
}

void bitmask_expand(const BitmaskRows& packed, DType dtype, int64_t columns, void* weight, const Executor& executor) {
  check_places(packed, dtype);
  check_bits(dispatch_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return expand_all(BitmaskWeight<T>(packed, columns), static_cast<T*>(weight), executor);
  }));
}

}  // namespace sparsekern::cpu
