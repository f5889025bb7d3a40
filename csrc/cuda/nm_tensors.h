// What the wrappers of nm_pack, nm_prune_pack and nm_unpack share.
#pragma once

#include "common/nm_layout.h"
#include "cuda/tensors.h"

namespace sparsekern::cuda {

inline nm::Type nm_type_of(const Tensor& tensor, const char* message) {
  switch (tensor.scalar_type()) {
    case ScalarType::Char: return nm::Type::i8;
    case ScalarType::BFloat16: return nm::Type::bf16;
    case ScalarType::Half: return nm::Type::f16;
    case ScalarType::Float: return nm::Type::f32;
    default: throw std::invalid_argument(message);
  }
}

inline ScalarType nm_word_type(const nm::Format& format) { return format.word_bits == 32 ? ScalarType::Int : ScalarType::Short; }

struct Packed {
  Tensor values, meta;
};

// Room for the packed form of a weight, whose shape is checked.
inline Packed new_packed(const Tensor& weight) {
  const nm::Format format = nm::format_of(static_cast<int>(weight.element_size()));
  check(
      weight.dim() == 2 && weight.size(0) % format.row_multiple == 0 && weight.size(1) % format.column_multiple() == 0,
      "weight: expected a shape that the layout divides");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  return {
      torch::stable::new_empty(weight, {rows, columns / 2}),
      torch::stable::new_empty(weight, {rows, columns / format.columns_per_word()}, nm_word_type(format))};
}

}  // namespace sparsekern::cuda
