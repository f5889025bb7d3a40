// What a kernel found wrong with its input's values. The kernel only says what; where is found by the op's reference, which
// sparsekern.backends calls when a bit is set.
#pragma once

namespace sparsekern::cuda {

enum Status : int {
  kNotFinite = 1,        // NaN, or also an infinity, as the op has it
  kTooManyNonZeros = 2,  // a group that does not fit the packed layout
  kInconsistent = 4,     // packed parts that do not belong together
};

}  // namespace sparsekern::cuda
