// Element types of activations and weights and their conversions, for host and device code without torch.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace sparsekern {

enum class DType { f32, bf16, f16 };

SPARSEKERN_HOST_DEVICE constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

SPARSEKERN_HOST_DEVICE inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

SPARSEKERN_HOST_DEVICE inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Storage types of one element. Conversion to float is exact; conversion from float rounds to nearest even.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

SPARSEKERN_HOST_DEVICE inline float to_float(float value) { return value; }

SPARSEKERN_HOST_DEVICE inline float to_float(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }

// No branch and no conditional multiplication, so that loops vectorise. The product rescales the exponent, also that of subnormals.
// NaN and Inf then get the exponent that marks them in a float.
SPARSEKERN_HOST_DEVICE inline float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  float converted;
  asm("cvt.f32.f16 %0, %1;" : "=f"(converted) : "h"(value.bits));
  return converted;
#else
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t scaled = float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bits_to_float(scaled | special | uint32_t{value.bits & 0x8000u} << 16);
#endif
}

template <class T>
SPARSEKERN_HOST_DEVICE T from_float(float value);

template <>
SPARSEKERN_HOST_DEVICE inline float from_float<float>(float value) {
  return value;
}

template <>
SPARSEKERN_HOST_DEVICE inline BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
SPARSEKERN_HOST_DEVICE inline Half from_float<Half>(float value) {
  const uint32_t bits = float_to_bits(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Adding 0.5 leaves the subnormal half, rounded to nearest even, in the low bits.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13)};
}

// Calls f with a null pointer of the element type, to instantiate a template over it.
template <class F>
auto dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::bf16: return f(static_cast<BFloat16*>(nullptr));
    case DType::f16: return f(static_cast<Half*>(nullptr));
    case DType::f32: break;
  }
  return f(static_cast<float*>(nullptr));
}

}  // namespace sparsekern
