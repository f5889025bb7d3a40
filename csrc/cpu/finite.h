#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/parallel.h"

namespace sparsekern::cpu {

// Throws std::invalid_argument for a value that is not finite, at `index` of a row-major matrix.
[[noreturn]] void refuse_nonfinite(const char* name, float value, int64_t index, int64_t columns);

// Throws std::invalid_argument naming the first NaN or Inf of a row-major matrix. Skips rows where `row_mask` is 0.
void require_finite(
    const char* name, const void* data, DType dtype, int64_t rows, int64_t columns, const uint8_t* row_mask,
    const Executor& executor);

// As require_finite, for the lower triangle of a square matrix.
void require_finite_lower(const char* name, const float* data, int64_t size, const Executor& executor);

}  // namespace sparsekern::cpu
