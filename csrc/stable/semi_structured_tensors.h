// Helpers shared by the wrappers of semi_structured_pack, semi_structured_prune_pack and semi_structured_unpack.
#pragma once

#include "common/semi_structured.h"
#include "stable/tensors.h"

namespace sparsekern::semi_structured {

inline Type type_of(const Tensor& tensor, const char* message) {
  switch (tensor.scalar_type()) {
    case ScalarType::Char: return Type::i8;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    case ScalarType::Float: return Type::f32;
    default: throw std::invalid_argument(message);
  }
}

inline Format format_of(const Tensor& tensor) { return format_of(static_cast<int>(tensor.element_size())); }

inline ScalarType word_type(const Format& format) { return format.word_bits == 32 ? ScalarType::Int : ScalarType::Short; }

inline bool divides(const Format& format, int64_t rows, int64_t columns) {
  return rows % format.row_multiple == 0 && columns % format.column_multiple() == 0;
}

struct Packed {
  Tensor values, meta;
};

// Allocates the packed form of a weight.
inline Packed new_packed(const Tensor& weight) {
  const Format format = format_of(weight);
  check(
      weight.dim() == 2 && divides(format, weight.size(0), weight.size(1)),
      "weight: expected a shape divisible into tiles of the layout");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  return {
      torch::stable::new_empty(weight, {rows, columns / 2}),
      torch::stable::new_empty(weight, {rows, columns / format.columns_per_word()}, word_type(format))};
}

inline void check_packed(const Tensor& values, const Tensor& meta) {
  type_of(values, "values: expected dtype bfloat16, float16, float32 or int8");
  const Format format = format_of(values);
  check(values.dim() == 2 && meta.dim() == 2, "values, meta: expected 2 dimensions");
  const int64_t rows = values.size(0), columns = 2 * values.size(1);
  check(divides(format, rows, columns), "values: expected a shape divisible into tiles of the layout");
  check(
      meta.scalar_type() == word_type(format) && meta.size(0) == rows && meta.size(1) == columns / format.columns_per_word(),
      "meta: expected the dtype and shape that go with values");
}

}  // namespace sparsekern::semi_structured
