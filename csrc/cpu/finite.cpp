#include "cpu/finite.h"

#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/dispatch.h"

namespace sparsekern::cpu {

namespace {

constexpr uint32_t exponent_mask(float) { return 0x7f800000u; }
constexpr uint16_t exponent_mask(BFloat16) { return 0x7f80u; }
constexpr uint16_t exponent_mask(Half) { return 0x7c00u; }

SPARSEKERN_INLINE uint32_t bits_of(float value) { return float_to_bits(value); }
SPARSEKERN_INLINE uint16_t bits_of(BFloat16 value) { return value.bits; }
SPARSEKERN_INLINE uint16_t bits_of(Half value) { return value.bits; }

// NaN and Inf have an exponent of all ones. There is no early exit, so that the loop vectorises.
template <class T>
SPARSEKERN_INLINE bool has_nonfinite(const T* row, int64_t columns) {
  using Bits = decltype(bits_of(T{}));
  constexpr Bits mask = exponent_mask(T{});
  Bits found = 0;
  for (int64_t i = 0; i < columns; ++i) found |= static_cast<Bits>((bits_of(row[i]) & mask) == mask);
  return found != 0;
}

template <class T>
[[noreturn]] void report(const char* name, const T* data, int64_t row, int64_t columns) {
  int64_t column = 0;
  while (std::isfinite(to_float(data[row * columns + column]))) ++column;
  refuse_nonfinite(name, to_float(data[row * columns + column]), row * columns + column, columns);
}

// `columns_of(row)` is the number of checked columns of a row; 0 skips the row.
template <class T, class ColumnsOf>
void scan(const char* name, const T* data, int64_t rows, int64_t columns, const ColumnsOf& columns_of, const Executor& executor) {
  const auto row_has_nonfinite = Entries<&has_nonfinite<T>>::choose();
  std::atomic<int64_t> first{rows};
  parallel_for(executor, rows, 1 + 65536 / (columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end && row < first.load(std::memory_order_relaxed); ++row) {
      if (!row_has_nonfinite(data + row * columns, columns_of(row))) continue;
      int64_t seen = first.load();
      while (row < seen && !first.compare_exchange_weak(seen, row)) {
      }
    }
  });
  if (first.load() < rows) report(name, data, first.load(), columns);
}

}  // namespace

void refuse_nonfinite(const char* name, float value, int64_t index, int64_t columns) {
  const std::string text = std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
  const std::string place = std::to_string(index / columns) + ", " + std::to_string(index % columns);
  throw std::invalid_argument(std::string(name) + ": expected finite values, got " + text + " at [" + place + "]");
}

void require_finite(
    const char* name, const void* data, DType dtype, int64_t rows, int64_t columns, const uint8_t* row_mask,
    const Executor& executor) {
  dispatch_dtype(dtype, [&](auto* type) {
    const auto* typed = static_cast<const std::remove_pointer_t<decltype(type)>*>(data);
    scan(
        name, typed, rows, columns, [=](int64_t row) { return row_mask == nullptr || row_mask[row] != 0 ? columns : 0; }, executor);
  });
}

void require_finite_lower(const char* name, const float* data, int64_t size, const Executor& executor) {
  scan(name, data, size, size, [](int64_t row) { return row + 1; }, executor);
}

}  // namespace sparsekern::cpu
