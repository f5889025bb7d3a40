// A group of a 2:4 weight as one integer in a register, its first column in the lowest bits, for host and device.
// common/semi_structured.h defines groups and codes.
#pragma once

#include <cstdint>

#include "common/semi_structured.h"

namespace sparsekern::semi_structured {

// Properties of an element type for packing: `group` holds a group, `stored` its kept elements, `word` the codes of several groups.
// Magnitudes above the bit pattern `infinity` are NaN.
template <class Element, class Group, class Stored, class Word, uint64_t kInfinity>
struct Kind {
  using element = Element;
  using group = Group;
  using stored = Stored;
  using word = Word;
  static constexpr Format format = format_of(sizeof(Element));
  static constexpr int bits = 8 * sizeof(Element);
  static constexpr uint64_t infinity = kInfinity;
};
struct Int8 : Kind<uint8_t, uint32_t, uint16_t, uint32_t, 0> {};
struct Bf16 : Kind<uint16_t, uint64_t, uint32_t, uint16_t, 0x7f80> {};
struct F16 : Kind<uint16_t, uint64_t, uint32_t, uint16_t, 0x7c00> {};
struct F32 : Kind<uint32_t, uint64_t, uint32_t, uint16_t, 0x7f800000> {};

// Calls f with a value of the Kind of a weight's type.
template <class F>
auto dispatch_type(Type type, const F& f) {
  switch (type) {
    case Type::i8: return f(Int8{});
    case Type::bf16: return f(Bf16{});
    case Type::f16: return f(F16{});
    case Type::f32: break;
  }
  return f(F32{});
}

// Repeats `pattern` in every element of a group.
template <class K>
SPARSEKERN_HOST_DEVICE constexpr typename K::group everywhere(uint64_t pattern) {
  typename K::group all = 0;
  for (int j = 0; j < K::format.group; ++j) all |= static_cast<typename K::group>(pattern) << (j * K::bits);
  return all;
}

template <class K>
constexpr uint64_t kTop = uint64_t{1} << (K::bits - 1);

// Returns the top bit of each non-zero element. Adding the largest magnitude carries into the top bit unless the magnitude is zero.
// An int8 of -128 has no magnitude bit but is not zero; a float with only the sign bit is zero.
template <class K>
SPARSEKERN_HOST_DEVICE inline typename K::group nonzero_bits(typename K::group group) {
  constexpr auto magnitudes = everywhere<K>(kTop<K> - 1);
  typename K::group carried = (group & magnitudes) + magnitudes;
  if (K::infinity == 0) carried |= group;
  return carried & everywhere<K>(kTop<K>);
}

// Returns a non-zero value if an element is NaN.
template <class K>
SPARSEKERN_HOST_DEVICE inline typename K::group nan_bits(typename K::group group) {
  if (K::infinity == 0) return 0;
  constexpr auto magnitudes = everywhere<K>(kTop<K> - 1);
  return ((group & magnitudes) + everywhere<K>(kTop<K> - 1 - K::infinity)) & everywhere<K>(kTop<K>);
}

SPARSEKERN_HOST_DEVICE constexpr bool fits(unsigned flags) {
  return (flags & 1) + (flags >> 1 & 1) + (flags >> 2 & 1) + (flags >> 3) <= 2;
}

// Returns the four flags that code_of takes, from the top bits of the elements.
template <class K>
SPARSEKERN_HOST_DEVICE inline unsigned flags_of(typename K::group top_bits) {
  if constexpr (K::bits == 8) {
    return (top_bits >> 7) * 0x01020408u >>
           24;  // the sixteen products do not overlap; each flag's product with its own factor ends up in these bits
  } else if constexpr (K::bits == 16) {
    const auto spread = static_cast<unsigned>(top_bits >> 15) | static_cast<unsigned>(top_bits >> 45);  // at bits 0, 16, 2, 18
    return (spread | spread >> 15) & 15u;
  } else {
    return (static_cast<unsigned>(top_bits >> 31) & 1u) * 3u | static_cast<unsigned>(top_bits >> 63) * 12u;
  }
}

// Returns the elements at the positions named by a code, the first in the low bits.
template <class K>
SPARSEKERN_HOST_DEVICE inline typename K::stored stored_of(typename K::group group, unsigned code) {
  using Stored = typename K::stored;
  if constexpr (K::format.group == 4) {
    constexpr auto element = static_cast<Stored>(kTop<K> * 2 - 1);
    const auto first = static_cast<Stored>(group >> (first_position(code) * K::bits)) & element;
    const auto second = static_cast<Stored>(group >> (second_position(code) * K::bits)) & element;
    return static_cast<Stored>(first | second << K::bits);
  } else {
    return static_cast<Stored>(group >> (first_position(code) / 2 * K::bits));
  }
}

// Returns the group that stored_of takes apart.
template <class K>
SPARSEKERN_HOST_DEVICE inline typename K::group group_of(typename K::stored stored, unsigned code) {
  using Group = typename K::group;
  if constexpr (K::format.group == 4) {
    constexpr auto element = static_cast<typename K::stored>(kTop<K> * 2 - 1);
    return static_cast<Group>(stored & element) << (first_position(code) * K::bits) | static_cast<Group>(stored >> K::bits)
                                                                                          << (second_position(code) * K::bits);
  } else {
    return static_cast<Group>(stored) << (first_position(code) / 2 * K::bits);
  }
}

}  // namespace sparsekern::semi_structured
