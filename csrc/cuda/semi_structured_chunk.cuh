// Packs 16 bytes of a 2:4 weight, a chunk, in the registers of one thread, for semi_structured_pack and semi_structured_prune_pack.
//
// Instructions are the cost, so that the groups of a chunk are processed side by side. Element j of each group is collected in one
// register, its plane, of two 16-bit lanes or four 8-bit lanes. A predicate of an element is the top bit of its lane; the other
// bits are undefined. Any function of three predicates is one instruction. A 16-bit weight takes eight integer instructions to
// pack, and nine to select and pack, addresses and exchanges included.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/semi_structured_group.h"
#include "cuda/status.h"

namespace sparsekern::cuda {

// The codes of a chunk's groups, 4 bits each, and half a chunk of stored elements.
struct PackedChunk {
  uint32_t codes;
  uint2 values;
};

template <class K>
constexpr uint32_t kTops = K::bits == 8 ? 0x80808080u : 0x80008000u;
template <class K>
constexpr uint32_t kMagnitudes = ~kTops<K>;

template <class K>
struct Planes {
  static_assert(K::format.group == 4, "a float32 fills a register");
  uint32_t element[4];
};

template <class K>
__device__ __forceinline__ Planes<K> planes_of(const uint4& chunk) {
  if constexpr (K::bits == 16) {
    return {
        {__byte_perm(chunk.x, chunk.z, 0x5410), __byte_perm(chunk.x, chunk.z, 0x7632), __byte_perm(chunk.y, chunk.w, 0x5410),
         __byte_perm(chunk.y, chunk.w, 0x7632)}};
  } else {
    const uint32_t low01 = __byte_perm(chunk.x, chunk.y, 0x5140), low23 = __byte_perm(chunk.z, chunk.w, 0x5140);
    const uint32_t high01 = __byte_perm(chunk.x, chunk.y, 0x7362), high23 = __byte_perm(chunk.z, chunk.w, 0x7362);
    return {
        {__byte_perm(low01, low23, 0x5410), __byte_perm(low01, low23, 0x7632), __byte_perm(high01, high23, 0x5410),
         __byte_perm(high01, high23, 0x7632)}};
  }
}

// Returns the predicates of semi_structured::nonzero_bits.
template <class K>
__device__ __forceinline__ uint32_t is_nonzero(uint32_t plane) {
  const uint32_t carried = (plane & kMagnitudes<K>)+kMagnitudes<K>;
  return K::infinity == 0 ? carried | plane : carried;
}

// Returns the predicates of semi_structured::nan_bits.
template <class K>
__device__ __forceinline__ uint32_t is_nan(uint32_t plane) {
  if constexpr (K::infinity == 0) {
    return 0;
  } else {
    constexpr auto above = static_cast<uint32_t>(semi_structured::kTop<K> - 1 - K::infinity) * 0x00010001u;
    return (plane & kMagnitudes<K>)+above;
  }
}

__device__ __forceinline__ uint32_t two_of(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | (a & c) | (b & c); }

// Returns the codes of semi_structured::code_of, in the low bits of each lane, from the predicates of the stored elements, at most
// two per group.
template <class K>
__device__ __forceinline__ uint32_t encode(const uint32_t (&stored)[4]) {
  constexpr uint32_t top = kTops<K>;
  const uint32_t a = stored[0], b = stored[1], d = stored[3];
  const uint32_t first0 = ~a & b, first1 = ~a & ~b;
  const uint32_t second0 = (a & b) | d | (~a & ~b), second1 = ~(a & b);
  const uint32_t second = (second1 & top) | (second0 >> 1 & top >> 1);
  const uint32_t first = (first1 & top) | (first0 >> 1 & top >> 1);
  return (second | first >> 2) >> (K::bits - 4);
}

// Returns the codes of a chunk side by side, and the elements that they name. Byte permutations pick these: a position is the
// selector.
template <class K>
__device__ __forceinline__ PackedChunk take(const uint4& chunk, uint32_t codes) {
  if constexpr (K::bits == 16) {
    const uint32_t selectors = (codes & 0x00030003u) * 0x22u + ((codes & 0x000c000cu) * 0x880u + 0x10101010u);
    return {
        (codes | codes >> 12) & 0xffu,
        make_uint2(__byte_perm(chunk.x, chunk.y, selectors), __byte_perm(chunk.z, chunk.w, selectors >> 16))};
  } else {
    const uint32_t selectors =
        (codes & 0x03030303u) | (codes << 2 & 0x30303030u) | 0x44004400u;  // the second of two groups comes next
    return {
        __byte_perm(codes | codes >> 4, 0, 0x4420),
        make_uint2(__byte_perm(chunk.x, chunk.y, selectors), __byte_perm(chunk.z, chunk.w, selectors >> 16))};
  }
}

// The same for float32: one of every two elements, two groups per chunk.
__device__ __forceinline__ PackedChunk take_float(const uint4& chunk, bool first_of_low, bool first_of_high) {
  constexpr unsigned first = semi_structured::code_of(0b0011), second = semi_structured::code_of(0b1100);
  return {
      (first_of_low ? first : second) | (first_of_high ? first : second) << 4,
      make_uint2(first_of_low ? chunk.x : chunk.y, first_of_high ? chunk.z : chunk.w)};
}

__device__ __forceinline__ bool float_is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > semi_structured::F32::infinity; }

// Returns whether a chunk has a NaN.
template <class K>
__device__ __forceinline__ bool has_nan(const uint4& chunk) {
  if constexpr (K::bits == 32) {
    return float_is_nan(chunk.x) || float_is_nan(chunk.y) || float_is_nan(chunk.z) || float_is_nan(chunk.w);
  } else {
    return ((is_nan<K>(chunk.x) | is_nan<K>(chunk.y) | is_nan<K>(chunk.z) | is_nan<K>(chunk.w)) & kTops<K>) != 0;
  }
}

// Packs the non-zeros of a chunk. Sets the bits of cuda/status.h if they do not fit.
template <class K>
__device__ __forceinline__ PackedChunk pack_chunk(const uint4& chunk, int& refused) {
  if (has_nan<K>(chunk)) refused |= kNotFinite;
  if constexpr (K::bits == 32) {
    const bool x = chunk.x << 1 != 0, y = chunk.y << 1 != 0, z = chunk.z << 1 != 0, w = chunk.w << 1 != 0;
    if ((x && y) || (z && w)) refused |= kTooManyNonZeros;
    return take_float(chunk, x, z);
  } else {
    const Planes<K> planes = planes_of<K>(chunk);
    uint32_t stored[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) stored[j] = is_nonzero<K>(planes.element[j]);
    const uint32_t three = (stored[0] & stored[1] & stored[2]) | (two_of(stored[0], stored[1], stored[2]) & stored[3]);
    if ((three & kTops<K>) != 0) refused |= kTooManyNonZeros;
    return take<K>(chunk, encode<K>(stored));
  }
}

}  // namespace sparsekern::cuda
