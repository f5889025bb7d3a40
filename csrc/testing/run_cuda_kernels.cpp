// Runs the CUDA kernels' own code on this CPU, on buffers of exactly the right size, and compares with the plain loop. Built with
// sanitizers by tests/native/test_cuda_on_cpu.py; a fault or a wrong value is a non-zero exit code.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "cuda/kernels.h"
#include "simt/cuda_runtime.h"

namespace {

void expect(bool condition, const char* what, int64_t size) {
  if (condition) return;
  std::fprintf(stderr, "%s: wrong at size %lld, threads %s\n", what, static_cast<long long>(size), simt::reversed ? "reversed" : "in order");
  std::exit(1);
}

void gram_symmetrize() {
  for (int64_t features : {0, 1, 2, 31, 32, 33, 63, 64, 65, 96, 97, 161}) {
    std::vector<float> gram(features * features);
    for (int64_t i = 0; i < features; ++i) {
      for (int64_t j = 0; j < features; ++j) {
        gram[i * features + j] = j <= i ? static_cast<float>(i * 1000 + j) : std::numeric_limits<float>::quiet_NaN();
      }
    }
    sparsekern::cuda::gram_symmetrize_(gram.data(), features, nullptr);
    for (int64_t i = 0; i < features; ++i) {
      for (int64_t j = 0; j < features; ++j) {
        expect(gram[i * features + j] == static_cast<float>(std::max(i, j) * 1000 + std::min(i, j)), "gram_symmetrize_", features);
      }
    }
  }
}

}  // namespace

int main() {
  for (bool reversed : {false, true}) {
    simt::reversed = reversed;
    gram_symmetrize();
  }
}
