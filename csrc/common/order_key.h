// Order keys: scores as integers in the same order. Selection compares keys on every device, so that one code serves all dtypes.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace sparsekern {

SPARSEKERN_HOST_DEVICE inline int32_t signed_bits(float value) { return static_cast<int32_t>(float_to_bits(value)); }
SPARSEKERN_HOST_DEVICE inline int32_t signed_bits(BFloat16 value) { return static_cast<int16_t>(value.bits); }
SPARSEKERN_HOST_DEVICE inline int32_t signed_bits(Half value) { return static_cast<int16_t>(value.bits); }

SPARSEKERN_HOST_DEVICE constexpr int32_t magnitude_bits(float) { return 0x7fffffff; }
SPARSEKERN_HOST_DEVICE constexpr int32_t magnitude_bits(BFloat16) { return 0x7fff; }
SPARSEKERN_HOST_DEVICE constexpr int32_t magnitude_bits(Half) { return 0x7fff; }

// Larger magnitudes are NaN.
SPARSEKERN_HOST_DEVICE constexpr int32_t infinity_bits(float) { return 0x7f800000; }
SPARSEKERN_HOST_DEVICE constexpr int32_t infinity_bits(BFloat16) { return 0x7f80; }
SPARSEKERN_HOST_DEVICE constexpr int32_t infinity_bits(Half) { return 0x7c00; }

// Returns a key ordered like the value with these sign-extended bits and this magnitude. Sign and magnitude become two's
// complement, which maps both zeros to 0.
SPARSEKERN_HOST_DEVICE constexpr int32_t order_key(int32_t bits, int32_t magnitude) {
  const int32_t sign = bits >> 31;
  return (magnitude ^ sign) - sign;
}

}  // namespace sparsekern
