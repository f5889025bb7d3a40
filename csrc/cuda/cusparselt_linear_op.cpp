// cusparselt_linear: a linear layer with a weight compressed by cuSPARSELt.
//
// Floor: half the arithmetic of the dense product, 2 * tokens * out_features * in_features / 2 FLOP at 790 TFLOP/s on an H200, or
// the bytes of the operands. cuSPARSELt computes the product; the plan, the only other cost, is cached (cuda/cusparselt_plans.h).
#include <optional>
#include <string>
#include <tuple>

#include "cuda/cusparselt_plans.h"
#include "cuda/tensors.h"

namespace sparsekern::cuda {

namespace {

constexpr int64_t kTokenMultiple = 8;  // rows of a 16-bit dense operand are a multiple of this

int cusparselt_type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return cusparselt::kBFloat16;
    case ScalarType::Half: return cusparselt::kHalf;
    default: throw std::invalid_argument("x: expected dtype bfloat16 or float16");
  }
}

// Pads the tokens to the number of rows that the library needs; the padding is uninitialised.
Tensor pad_tokens(const Tensor& x, int64_t padded) {
  const int64_t tokens = x.size(0);
  if (padded == tokens) return aligned(torch::stable::contiguous(x));
  Tensor rows = torch::stable::new_empty(x, {padded, x.size(1)});
  Tensor own = torch::stable::narrow(rows, 0, 0, tokens);
  torch::stable::copy_(own, x);
  return rows;
}

Tensor new_workspace(const Tensor& like, const cusparselt::Plan& plan) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(plan.workspace_bytes())}, ScalarType::Byte);
}

void check_operands(const Tensor& x, const Tensor& compressed, int64_t out_features, const std::optional<Tensor>& bias) {
  check(x.dim() == 2, "x: expected [tokens, in_features]");
  check(compressed.scalar_type() == x.scalar_type(), "compressed: expected the dtype of x");
  check_contiguous(compressed, "compressed: expected contiguous memory");
  check_same_device(x, compressed, "compressed: expected the device of x");
  check(out_features > 0 && x.size(1) > 0, "out_features, x: expected at least one feature");
  check(
      compressed.numel() >= out_features * x.size(1) / 16 * 9,
      "compressed: expected values and metadata of [out_features, in_features]");
  if (!bias) return;
  check(
      bias->dim() == 1 && bias->size(0) == out_features && bias->scalar_type() == x.scalar_type(),
      "bias: expected [out_features] of the dtype of x");
  check_contiguous(*bias, "bias: expected contiguous memory");
  check_same_device(x, *bias, "bias: expected the device of x");
}

// With `search`, the first call of a shape searches for its algorithm and waits for the device.
Tensor cusparselt_linear(Tensor x, Tensor compressed, int64_t out_features, std::optional<Tensor> bias, bool search) {
  const int type = cusparselt_type_of(x);
  check_operands(x, compressed, out_features, bias);
  const int64_t tokens = x.size(0), padded = (tokens + kTokenMultiple - 1) / kTokenMultiple * kTokenMultiple;
  const DeviceGuard guard(x);
  Tensor product = torch::stable::new_empty(x, {padded, out_features});
  if (tokens == 0) return product;
  const Tensor rows = pad_tokens(x, padded);
  const cusparselt::Problem problem{type, out_features, x.size(1), padded, bias ? bias->const_data_ptr() : nullptr};
  cusparselt::Plans& plans = cusparselt::plans_of(x.get_device_index());
  std::optional<cusparselt::Algorithm> algorithm = plans.algorithm(problem);
  if (!algorithm && search) {
    const auto trial = plans.make(problem, {});
    const Tensor workspace = new_workspace(x, *trial);
    // Search on a copy: every available algorithm runs, and the library does not promise to leave its operands unchanged.
    const Tensor copy = torch::stable::clone(compressed);
    algorithm = trial->search(
        copy.const_data_ptr(), rows.const_data_ptr(), product.mutable_data_ptr(), workspace.mutable_data_ptr(), current_stream(x));
    plans.remember(problem, *algorithm);
  }
  const cusparselt::Plan& plan = plans.get(problem, algorithm.value_or(cusparselt::Algorithm{}));
  const Tensor workspace = new_workspace(x, plan);
  plan.multiply(
      compressed.const_data_ptr(), rows.const_data_ptr(), product.mutable_data_ptr(), workspace.mutable_data_ptr(),
      current_stream(x));
  return padded == tokens ? product : torch::stable::narrow(product, 0, 0, tokens);
}

int64_t cusparselt_open(std::string library) { return cusparselt::open(library).version; }

std::tuple<int64_t, int64_t> cusparselt_counts() { return {cusparselt::counts().plans, cusparselt::counts().searches}; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekern_cuda, m) {
  m.def("cusparselt_open(str library) -> int");
  m.def("cusparselt_counts() -> (int plans, int searches)");
  m.def("cusparselt_linear(Tensor x, Tensor compressed, int out_features, Tensor? bias, bool search) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(sparsekern_cuda, CompositeExplicitAutograd, m) {
  m.impl("cusparselt_open", TORCH_BOX(&cusparselt_open));
  m.impl("cusparselt_counts", TORCH_BOX(&cusparselt_counts));
}
STABLE_TORCH_LIBRARY_IMPL(sparsekern_cuda, SPARSEKERN_DEVICE_KEY, m) { m.impl("cusparselt_linear", TORCH_BOX(&cusparselt_linear)); }

}  // namespace sparsekern::cuda
