#include <cmath>

#include "cpu/tensors.h"

namespace sparsekern::cpu {

namespace {

bool is_like(const Tensor& tensor, const Tensor& weight) {
  if (tensor.dim() != weight.dim()) return false;
  for (int64_t axis = 0; axis < weight.dim(); ++axis) {
    if (tensor.size(axis) != weight.size(axis)) return false;
  }
  return true;
}

void check_alike(const Tensor& tensor, const Tensor& weight, ScalarType type, const char* message) {
  check(is_like(tensor, weight) && tensor.scalar_type() == type, message);
}

// A contiguous optional argument, copied if needed, kept alive beside its pointer.
struct Optional {
  std::optional<Tensor> tensor;

  Optional(const std::optional<Tensor>& given, const Tensor& weight, ScalarType type, const char* message) {
    if (!given) return;
    check_alike(*given, weight, type, message);
    tensor = torch::stable::contiguous(*given);
  }
  const void* data() const { return tensor ? tensor->const_data_ptr() : nullptr; }
};

void masked_adamw_of(
    Tensor weight, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, int64_t step, double lr, std::optional<Tensor> mask,
    double beta1, double beta2, double eps, double weight_decay, double grad_scale, std::optional<Tensor> anchor, double pull,
    std::optional<Tensor> half) {
  check(weight.scalar_type() == ScalarType::Float, "weight: expected float32");
  check(is_like(grad, weight), "grad: expected the shape of weight");
  check_alike(exp_avg, weight, ScalarType::Float, "exp_avg: expected float32 of the shape of weight");
  check_alike(exp_avg_sq, weight, ScalarType::Float, "exp_avg_sq: expected float32 of the shape of weight");
  check(step >= 1, "step: expected at least 1");
  const Optional dense_mask(mask, weight, ScalarType::Bool, "mask: expected bool of the shape of weight");
  const Optional dense_anchor(anchor, weight, ScalarType::Float, "anchor: expected float32 of the shape of weight");
  check(pull == 0.0 || anchor, "pull: expected 0 without an anchor");
  DType half_dtype = DType::f32;
  if (half) {
    half_dtype = dtype_of(*half, "half: expected dtype bfloat16 or float16");
    check(is_like(*half, weight) && half_dtype != DType::f32, "half: expected bfloat16 or float16 of the shape of weight");
  }
  const Tensor dense_grad = torch::stable::contiguous(grad);
  const AdamStep of_step{
      static_cast<float>(beta1),
      static_cast<float>(1 - beta1),
      static_cast<float>(beta2),
      static_cast<float>(1 - beta2),
      static_cast<float>(1 - lr * weight_decay),
      static_cast<float>(lr / (1 - std::pow(beta1, static_cast<double>(step)))),
      static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, static_cast<double>(step)))),
      static_cast<float>(eps),
      static_cast<float>(grad_scale),
      static_cast<float>(pull)};
  const int64_t columns = weight.dim() > 0 ? weight.size(weight.dim() - 1) : 1;
  in_place(weight, [&](Tensor& w) {
    in_place(exp_avg, [&](Tensor& m) {
      in_place(exp_avg_sq, [&](Tensor& v) {
        const auto run = [&](void* copy) {
          const AdamTensors tensors{
              float_data(w),
              dense_grad.const_data_ptr(),
              dtype_of(grad, "grad: expected dtype float32, bfloat16 or float16"),
              float_data(m),
              float_data(v),
              static_cast<const uint8_t*>(dense_mask.data()),
              static_cast<const float*>(dense_anchor.data()),
              copy,
              half_dtype};
          masked_adamw_(tensors, of_step, weight.numel(), columns, torch_executor());
        };
        if (half) {
          in_place(*half, [&](Tensor& copy) { run(copy.mutable_data_ptr()); });
        } else {
          run(nullptr);
        }
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparsekern, CPU, m) { m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_of)); }

}  // namespace sparsekern::cpu
