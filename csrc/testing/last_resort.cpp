// A way to what no op call is known to reach: reverse_cholesky's float64, which runs only where float32 fails at every damping.
// Part of the sanitized build only.
#include "cpu/kernels.h"

extern "C" __attribute__((visibility("default"))) double sparsekern_reverse_cholesky(
    const float* gram, int64_t features, double damping, double smallest_pivot, float* factor) {
  return sparsekern::cpu::reverse_cholesky(gram, features, damping, factor, {1, nullptr}, smallest_pivot);
}
