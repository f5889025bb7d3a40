// What the tensor cores and the asynchronous copies of cuda/tensor_core.cuh do, on a CPU.
//
// An asynchronous copy arrives when its thread waits for it. Until then its place holds NaN, so that a kernel that reads too early,
// or that still reads what it overwrites, has a wrong result.
#pragma once

#include <array>

#include "simt/fibers.h"

namespace simt {

inline void copy_async(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    Scheduler::running->fail("an asynchronous copy is not aligned to 16 bytes");
  }
  std::memset(to, 0xff, 16);
  Fiber& fiber = Scheduler::running->current();
  fiber.copies.push_back({to, from, fiber.copy_groups});
}

inline void commit_copies() { Scheduler::running->current().copy_groups += 1; }

// Completes all but the `left` youngest groups of the current thread's copies.
inline void wait_for_copies(unsigned left) {
  Fiber& fiber = Scheduler::running->current();
  auto copy = fiber.copies.begin();
  for (; copy != fiber.copies.end() && copy->group + left < fiber.copy_groups; ++copy) std::memcpy(copy->to, copy->from, 16);
  fiber.copies.erase(fiber.copies.begin(), copy);
}

// Every lane of a warp brings `kWords` words, an even number, and gets those of all lanes.
template <size_t kWords>
std::array<std::array<uint32_t, kWords>, kWarp> exchange(const std::array<uint32_t, kWords>& own) {
  std::array<std::array<uint32_t, kWords>, kWarp> all;
  for (size_t i = 0; i < kWords; i += 2) {
    warp_meeting(0xffffffffu, uint64_t{own[i + 1]} << 32 | own[i], [&](const uint64_t* words, unsigned, unsigned) {
      for (unsigned lane = 0; lane < kWarp; ++lane) {
        all[lane][i] = static_cast<uint32_t>(words[lane]);
        all[lane][i + 1] = static_cast<uint32_t>(words[lane] >> 32);
      }
      return 0;
    });
  }
  return all;
}

// Element `half` of the pair of 16-bit values in a word.
template <class T>
float half_of(uint32_t word, unsigned half) {
  return to_float(T{static_cast<uint16_t>(word >> 16 * half)});
}

// The fragments of mma.m16n8k16 and mma.sp.m16n8k32: element (row, k) of the 16 x 16 stored values, and (k, column) of the other.
template <class T, size_t kWords>
float a_element(const std::array<std::array<uint32_t, kWords>, kWarp>& all, unsigned row, unsigned k) {
  return half_of<T>(all[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k % 2);
}

template <class T, size_t kWords>
float b_element(const std::array<std::array<uint32_t, kWords>, kWarp>& all, unsigned k, unsigned column) {
  return half_of<T>(all[column * 4 + k % 8 / 2][k / 8], k % 2);
}

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const unsigned lane = Scheduler::running->current().linear % kWarp;
  const auto left = exchange<4>({a[0], a[1], a[2], a[3]});
  const auto right = exchange<2>({b[0], b[1]});
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) sums[i] += a_element<T>(left, row, k) * b_element<T>(right, k, column);
  }
}

// Lanes 0 and 1 of every four bring the positions of the first and of the last eight stored values of two rows, with `selector` 1
// lanes 2 and 3.
//
// Source: PTX ISA, "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types", whose figure of the metadata LLVM's test
// mlir/test/Integration/Dialect/SparseTensor/GPU/CUDA/sparse-mma-2-4-f16.mlir puts into words and runs on a GPU. The layout that
// CUTLASS's kernels read agrees (testing/sparse_tensor_core.cpp).
template <class T>
void multiply_add_sparse(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t positions, unsigned selector) {
  const unsigned lane = Scheduler::running->current().linear % kWarp;
  const auto left = exchange<4>({a[0], a[1], a[2], a[3]});
  const auto right = exchange<4>({b[0], b[1], b[2], b[3]});
  const auto places = exchange<2>({positions, 0});
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t word = places[row % 8 * 4 + 2 * selector + k / 8][0];
      const unsigned position = word >> (16 * (row / 8) + 2 * (k % 8)) & 3u;
      sums[i] += a_element<T>(left, row, k) * b_element<T>(right, 4 * (k / 2) + position, column);
    }
  }
}

// Lane `l` gets two elements of row `l / 4` of each of four matrices of 8 x 8 halves; lanes 8 i to 8 i + 7 bring the rows of matrix i.
inline void load_matrices(uint32_t (&words)[4], const void* row) {
  const auto address = reinterpret_cast<uintptr_t>(row);
  if (address % 16 != 0) Scheduler::running->fail("a row of a matrix is not aligned to 16 bytes");
  const auto all = exchange<2>({static_cast<uint32_t>(address), static_cast<uint32_t>(uint64_t{address} >> 32)});
  const unsigned lane = Scheduler::running->current().linear % kWarp;
  for (unsigned i = 0; i < 4; ++i) {
    const auto& its = all[8 * i + lane / 4];
    const auto* begin = reinterpret_cast<const unsigned char*>(static_cast<uintptr_t>(uint64_t{its[1]} << 32 | its[0]));
    std::memcpy(&words[i], begin + lane % 4 * 4, 4);
  }
}

}  // namespace simt
