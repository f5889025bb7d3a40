// Helpers shared by the wrappers of plain_split and gated_split.
#pragma once

#include <array>
#include <string>

#include "cpu/tensors.h"

namespace sparsekern::cpu {

inline Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  check(name == "gelu_tanh", "activation: expected relu, silu, gelu or gelu_tanh");
  return Activation::gelu_tanh;
}

// Contiguous tensors of one shape and dtype.
template <size_t kCount>
struct Alike {
  std::array<Tensor, kCount> tensors;
  DType dtype;

  explicit Alike(std::array<Tensor, kCount> given)
      : tensors(given), dtype(dtype_of(given[0], "activated: expected dtype float32, bfloat16 or float16")) {
    for (Tensor& tensor : tensors) {
      check(
          tensor.dim() == 2 && tensor.size(0) == given[0].size(0) && tensor.size(1) == given[0].size(1) &&
              tensor.scalar_type() == given[0].scalar_type(),
          "activated, up, gate, preactivation, start: expected one shape [tokens, features] and one dtype");
      tensor = torch::stable::contiguous(tensor);
    }
  }
  const void* data(size_t which) const { return tensors[which].const_data_ptr(); }
  Tensor new_one() const { return torch::stable::new_empty(tensors[0], {tensors[0].size(0), tensors[0].size(1)}); }
};

}  // namespace sparsekern::cpu
