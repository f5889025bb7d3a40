// A group of a 2:4 weight as one integer in a register, its first column in the lowest bits: what packing asks of it, for host and
// device. common/semi_structured.h says what groups and codes are.
#pragma once

#include <cstdint>

#include "common/semi_structured.h"

namespace sparsekern::semi_structured {

// What packing must know of an element type: `group` holds a group, `stored` what is kept of it, `word` the codes of some groups;
// `infinity` is the pattern above which a magnitude is NaN.
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

// Calls f with a value of the Kind that goes with a weight's type.
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

// `pattern` in every element of a group.
template <class K>
SPARSEKERN_HOST_DEVICE constexpr typename K::group everywhere(uint64_t pattern) {
  typename K::group all = 0;
  for (int j = 0; j < K::format.group; ++j) all |= static_cast<typename K::group>(pattern) << (j * K::bits);
  return all;
}

template <class K>
constexpr uint64_t kTop = uint64_t{1} << (K::bits - 1);

// The top bit of each element that is not zero. Adding the largest magnitude carries into it unless the magnitude is zero; an int8
// of -128 has no magnitude bit but is not zero, while a float with only the sign bit is.
template <class K>
SPARSEKERN_HOST_DEVICE inline typename K::group nonzero_bits(typename K::group group) {
  constexpr auto magnitudes = everywhere<K>(kTop<K> - 1);
  typename K::group carried = (group & magnitudes) + magnitudes;
  if (K::infinity == 0) carried |= group;
  return carried & everywhere<K>(kTop<K>);
}

// Not zero if an element is NaN.
template <class K>
SPARSEKERN_HOST_DEVICE inline typename K::group nan_bits(typename K::group group) {
  if (K::infinity == 0) return 0;
  constexpr auto magnitudes = everywhere<K>(kTop<K> - 1);
  return ((group & magnitudes) + everywhere<K>(kTop<K> - 1 - K::infinity)) & everywhere<K>(kTop<K>);
}

SPARSEKERN_HOST_DEVICE constexpr bool fits(unsigned flags) {
  return (flags & 1) + (flags >> 1 & 1) + (flags >> 2 & 1) + (flags >> 3) <= 2;
}

// The flags as code_of wants them, four bits, from the top bits of the elements.
template <class K>
SPARSEKERN_HOST_DEVICE inline unsigned flags_of(typename K::group top_bits) {
  if constexpr (K::bits == 8) {
    return (top_bits >> 7) * 0x01020408u >>
           24;  // no two of the sixteen products meet, and those of a flag with its own factor end up there
  } else if constexpr (K::bits == 16) {
    const auto spread = static_cast<unsigned>(top_bits >> 15) | static_cast<unsigned>(top_bits >> 45);  // at bits 0, 16, 2, 18
    return (spread | spread >> 15) & 15u;
  } else {
    return (static_cast<unsigned>(top_bits >> 31) & 1u) * 3u | static_cast<unsigned>(top_bits >> 63) * 12u;
  }
}

// The elements at the positions that a code names, the first in the low bits.
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

// The group that stored_of takes apart.
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
