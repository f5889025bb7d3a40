// Activation functions of feed-forward networks and their slopes, in float arithmetic that compilers vectorise: the exponential is
// a polynomial, without branches or calls.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace sparsekern::cpu {

// Returns `condition ? yes : no` without a branch. Compilers do not vectorise branches on float comparisons, because those could
// trap.
SPARSEKERN_INLINE float select(bool condition, float yes, float no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return bits_to_float((float_to_bits(yes) & mask) | (float_to_bits(no) & ~mask));
}

enum class Activation { relu, silu, gelu, gelu_tanh };

// Returns e^x within 2 units in the last place. The argument is clamped so that the result is a normal float; NaN stays NaN.
SPARSEKERN_INLINE float exp_of(float x) {
  x = select(x < -87.0f, -87.0f, x);
  x = select(x > 88.0f, 88.0f, x);
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
  const float shifted = x * 1.44269504f + 0x1.8p23f;
  const float n = shifted - 0x1.8p23f;
  const float f = x - n * 0.693359375f + n * 2.12194440e-4f;  // log(2) in two parts; the first has few bits
  float poly = 1.9875691500e-4f;
  poly = poly * f + 1.3981999507e-3f;
  poly = poly * f + 8.3334519073e-3f;
  poly = poly * f + 4.1665795894e-2f;
  poly = poly * f + 1.6666665459e-1f;
  poly = poly * f + 5.0000001201e-1f;
  poly = poly * (f * f) + f + 1.0f;
  return poly * bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
}

struct Activated {
  float value, slope;
};

template <Activation kActivation>
SPARSEKERN_INLINE Activated activate(float x) {
  if constexpr (kActivation == Activation::relu) {
    return {select(x > 0.0f, x, 0.0f), select(x > 0.0f, 1.0f, 0.0f)};
  } else if constexpr (kActivation == Activation::silu) {
    const float gate = 1.0f / (1.0f + exp_of(-x));
    return {x * gate, gate * (1.0f + x * (1.0f - gate))};
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    // (1 + tanh(u)) / 2 is the logistic function of 2 u.
    constexpr float kTwice = 1.59576912f;  // 2 sqrt(2 / pi)
    constexpr float kCubic = 0.044715f;
    const float gate = 1.0f / (1.0f + exp_of(-kTwice * (x + kCubic * x * x * x)));
    return {x * gate, gate + x * gate * (1.0f - gate) * (kTwice * (1.0f + 3.0f * kCubic * x * x))};
  } else {
    // Abramowitz and Stegun 7.1.26, within 1.5e-7 of the normal distribution's tail; its exponential is also the density's.
    const float size = select(x < 0.0f, -x, x);
    const float bell = exp_of(-0.5f * x * x);
    const float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * size);
    float poly = 1.061405429f;
    poly = poly * t - 1.453152027f;
    poly = poly * t + 1.421413741f;
    poly = poly * t - 0.284496736f;
    poly = poly * t + 0.254829592f;
    const float tail = 0.5f * poly * t * bell;
    const float below = select(x < 0.0f, tail, 1.0f - tail);
    return {x * below, below + x * 0.39894228f * bell};
  }
}

}  // namespace sparsekern::cpu
