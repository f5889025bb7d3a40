// The best product of one token with a dense bf16 weight that we know how to write: the honest baseline of the packed products.
// It has what they have: floats by a shift and a mask, accumulators enough, values prefetched 4 KiB ahead, torch's threads.
#include <immintrin.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "common/dtype.h"
#include "cpu/isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int kRows = 4;  // that share the registers of x

// x: 16 floats of even columns, then 16 of odd ones, for every 32 columns.
SPARSEKERN_AVX512 void multiply_rows(const uint16_t* weight, int64_t columns, const float* x, float* sums) {
  const __m512i high = _mm512_set1_epi32(-65536);
  __m512 even[kRows], odd[kRows];
  for (int row = 0; row < kRows; ++row) even[row] = odd[row] = _mm512_setzero_ps();
  for (int64_t column = 0; column < columns; column += 32) {
    const __m512 x_even = _mm512_loadu_ps(x + column), x_odd = _mm512_loadu_ps(x + column + 16);
    for (int row = 0; row < kRows; ++row) {
      const uint16_t* p = weight + row * columns + column;
      __builtin_prefetch(reinterpret_cast<const char*>(p) + 4096);
      const __m512i pairs = _mm512_loadu_si512(p);
      even[row] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), x_even, even[row]);
      odd[row] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pairs, high)), x_odd, odd[row]);
    }
  }
  for (int row = 0; row < kRows; ++row) sums[row] = _mm512_reduce_add_ps(_mm512_add_ps(even[row], odd[row]));
}

Tensor dense_gemv(Tensor x, Tensor weight) {
  const int64_t rows = weight.size(0), columns = weight.size(1);
  if (!__builtin_cpu_supports("avx512bw")) throw std::runtime_error("dense_gemv: expected a CPU with AVX-512");
  if (x.scalar_type() != ScalarType::BFloat16 || weight.scalar_type() != ScalarType::BFloat16 || !x.is_contiguous() ||
      !weight.is_contiguous() || x.numel() != columns || columns % 32 != 0 || rows % kRows != 0) {
    throw std::invalid_argument("dense_gemv: expected one contiguous bfloat16 token, columns divisible by 32 and rows by 4");
  }
  Tensor y = torch::stable::new_empty(x, {1, rows});
  const auto* bits = static_cast<const sparsekern::BFloat16*>(x.const_data_ptr());
  std::vector<float> floats(static_cast<size_t>(columns));
  for (int64_t i = 0; i < columns; ++i)
    floats[static_cast<size_t>(i / 32 * 32 + i % 2 * 16 + i % 32 / 2)] = sparsekern::to_float(bits[i]);
  const auto* data = static_cast<const uint16_t*>(weight.const_data_ptr());
  auto* out = static_cast<sparsekern::BFloat16*>(y.mutable_data_ptr());
  torch::stable::parallel_for(0, rows / kRows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kRows; i < end * kRows; i += kRows) {
      float sums[kRows];
      multiply_rows(data + i * columns, columns, floats.data(), sums);
      for (int row = 0; row < kRows; ++row) out[i + row] = sparsekern::from_float<sparsekern::BFloat16>(sums[row]);
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(sparsekern_bench, m) { m.def("dense_gemv(Tensor x, Tensor weight) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(sparsekern_bench, CPU, m) { m.impl("dense_gemv", TORCH_BOX(&dense_gemv)); }
