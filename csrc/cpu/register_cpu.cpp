// The stable-ABI side of the CPU kernels: checks that keep a kernel inside its memory, outputs, and torch's thread pool.
// Friendly messages about shapes and dtypes come from the Python wrappers; these checks are for direct calls of torch.ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace sparsekern::cpu {

namespace {

Executor torch_executor() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t begin, int64_t end, int64_t grain, Executor::RangeFunction function, void* context) {
            torch::stable::parallel_for(
                begin, end, grain, [=](int64_t range_begin, int64_t range_end) { function(range_begin, range_end, context); });
          }};
}

void check(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

float* float_data(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

void check_square_float(const Tensor& tensor, const char* message) {
  check(tensor.dim() == 2 && tensor.size(0) == tensor.size(1) && tensor.scalar_type() == ScalarType::Float, message);
}

// Runs f on contiguous memory and copies back where the caller's tensor was strided.
template <class F>
void in_place(Tensor& tensor, const F& f) {
  Tensor dense = torch::stable::contiguous(tensor);
  f(dense);
  if (dense.data_ptr() != tensor.data_ptr()) torch::stable::copy_(tensor, dense);
}

void gram_symmetrize(Tensor gram) {
  check_square_float(gram, "gram: expected a square float32 matrix");
  in_place(gram, [](Tensor& dense) { gram_symmetrize_(float_data(dense), dense.size(0), torch_executor()); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("gram_symmetrize_", TORCH_BOX(&gram_symmetrize)); }

}  // namespace sparsekern::cpu
