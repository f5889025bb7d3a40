// What the wrappers of nm_pack, nm_prune_pack and nm_unpack share.
#pragma once

#include "common/nm_layout.h"
#include "stable/tensors.h"

namespace sparsekern {

inline nm::Type nm_type_of(const Tensor& tensor, const char* message) {
  switch (tensor.scalar_type()) {
    case ScalarType::Char: return nm::Type::i8;
    case ScalarType::BFloat16: return nm::Type::bf16;
    case ScalarType::Half: return nm::Type::f16;
    case ScalarType::Float: return nm::Type::f32;
    default: throw std::invalid_argument(message);
  }
}

inline nm::Format nm_format_of(const Tensor& tensor) { return nm::format_of(static_cast<int>(tensor.element_size())); }

inline ScalarType nm_word_type(const nm::Format& format) { return format.word_bits == 32 ? ScalarType::Int : ScalarType::Short; }

inline bool nm_divides(const nm::Format& format, int64_t rows, int64_t columns) {
  return rows % format.row_multiple == 0 && columns % format.column_multiple() == 0;
}

struct Packed {
  Tensor values, meta;
};

// Room for the packed form of a weight.
inline Packed new_packed(const Tensor& weight) {
  const nm::Format format = nm_format_of(weight);
  check(
      weight.dim() == 2 && nm_divides(format, weight.size(0), weight.size(1)), "weight: expected a shape that the layout divides");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  return {
      torch::stable::new_empty(weight, {rows, columns / 2}),
      torch::stable::new_empty(weight, {rows, columns / format.columns_per_word()}, nm_word_type(format))};
}

inline void check_packed(const Tensor& values, const Tensor& meta) {
  nm_type_of(values, "values: expected dtype bfloat16, float16, float32 or int8");
  const nm::Format format = nm_format_of(values);
  check(values.dim() == 2 && meta.dim() == 2, "values, meta: expected 2 dimensions");
  const int64_t rows = values.size(0), columns = 2 * values.size(1);
  check(nm_divides(format, rows, columns), "values: expected a shape that the layout divides");
  check(
      meta.scalar_type() == nm_word_type(format) && meta.size(0) == rows && meta.size(1) == columns / format.columns_per_word(),
      "meta: expected the dtype and shape that go with values");
}

}  // namespace sparsekern
