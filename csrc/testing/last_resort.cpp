// Access to the float64 arithmetic of reverse_cholesky, which runs only if float32 fails at every damping; no op call is known to
// reach it. Part of the sanitized build only.
#include "cpu/kernels.h"

extern "C" __attribute__((visibility("default"))) double sparsekern_reverse_cholesky(
    const float* gram, int64_t features, double damping, double smallest_pivot, float* factor) {
  return sparsekern::cpu::reverse_cholesky(gram, features, damping, factor, {1, nullptr}, smallest_pivot);
}
