// Status bits for invalid values in a kernel's input. The kernel reports only the kind. The op's reference, which
// sparsekern.backends calls if a bit is set, finds the place.
#pragma once

namespace sparsekern::cuda {

enum Status : int {
  kNotFinite = 1,        // NaN; for some ops also an infinity
  kTooManyNonZeros = 2,  // a group that does not fit the packed layout
  kInconsistent = 4,     // packed tensors that contradict each other
};

}  // namespace sparsekern::cuda
