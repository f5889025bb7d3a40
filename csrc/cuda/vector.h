// 16 bytes of weights or scores, as integers of their size: the unit of a thread's reads and writes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sparsekern::cuda {

// Indices become constants when the loops over them are unrolled, so that the words stay in registers.
template <class Bits>
struct Vector {
  static_assert(sizeof(Bits) == 2 || sizeof(Bits) == 4, "elements are 2 or 4 bytes");
  static constexpr int kSize = 16 / sizeof(Bits);
  static constexpr int kPerWord = 4 / sizeof(Bits);

  uint32_t words[4];

  __device__ Bits operator[](int i) const {
    return static_cast<Bits>(words[i / kPerWord] >> 8 * static_cast<int>(sizeof(Bits)) * (i % kPerWord));
  }
  // Must be called in ascending order of i, once for each.
  __device__ void set(int i, uint32_t bits) { words[i / kPerWord] = i % kPerWord == 0 ? bits : words[i / kPerWord] | bits << 16; }

  __device__ static Vector read(const Bits* aligned) {
    const uint4 raw = *reinterpret_cast<const uint4*>(aligned);
    return {{raw.x, raw.y, raw.z, raw.w}};
  }
  __device__ void write(Bits* aligned) const {
    *reinterpret_cast<uint4*>(aligned) = make_uint4(words[0], words[1], words[2], words[3]);
  }
};

inline bool is_aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Consecutive elements, read as vectors from the first on; `filler` pads the last vector.
template <class Bits>
struct Run {
  static constexpr int kSize = Vector<Bits>::kSize;

  const Bits* elements;
  int64_t count;
  bool aligned;  // to 16 bytes
  Bits filler;

  __device__ int64_t vectors() const { return (count + kSize - 1) / kSize; }

  __device__ Vector<Bits> read(int64_t vector) const {
    const int64_t first = vector * kSize;
    if (aligned && first + kSize <= count) return Vector<Bits>::read(elements + first);
    const int left = count - first < kSize ? static_cast<int>(count - first) : kSize;
    Vector<Bits> result = {};
#pragma unroll
    for (int i = 0; i < kSize; ++i) result.set(i, i < left ? elements[first + i] : filler);
    return result;
  }
};

}  // namespace sparsekern::cuda
