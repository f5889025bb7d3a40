// Warp-wide products on the tensor cores, their operands, and asynchronous copies of 16 bytes into shared memory.
//
// A lane is (g, t) = (lane / 4, lane % 4). Of the sums, [16 rows, 8 columns], it holds columns 2 t and 2 t + 1 of row g, then of row
// g + 8. All lanes of a warp call these functions together. testing/simt/tensor_core.h defines them for tests without a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#ifdef SPARSEKERN_SIMT
#include "simt/tensor_core.h"
#endif

namespace sparsekern::cuda {

#ifdef SPARSEKERN_SIMT

using simt::commit_copies;
using simt::copy_async;
using simt::load_matrices;
using simt::multiply_add;

template <unsigned kLeft>
void wait_for_copies() {
  simt::wait_for_copies(kLeft);
}

template <class T, unsigned kSelector>
void multiply_add_sparse(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t positions) {
  simt::multiply_add_sparse<T>(sums, a, b, positions, kSelector);
}

#elif defined(__CUDACC__)

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Begins to copy 16 bytes, past the first-level cache. They may be read after `wait_for_copies` of this thread, by others after a
// barrier too.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// Makes a group of the copies that this thread has begun since the last group; it may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the `kLeft` youngest groups of this thread.
template <unsigned kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Reads four matrices of 8 x 8 halves: lanes 8 i to 8 i + 7 bring the rows of matrix i, in shared memory, of 16 bytes each. A lane gets
// elements 2 t and 2 t + 1 of row g of each.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row)));
}

// Adds a [16, 16] times b [16, 8]. Word 0 of `a` holds k = 2 t and 2 t + 1 of row g, word 1 of row g + 8; words 2 and 3 those of
// k + 8. Word 0 of `b` holds k = 2 t and 2 t + 1 of column g, word 1 those of k + 8.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// The same for a [16, 32] with two values stored of every four k: `a` holds the [16, 16] stored ones, and `b` is [32, 8], a word for
// every eight k. With `kSelector` 0, lane t = 0 brings the positions of the stored values 0 to 7, two bits each, of row g in its
// low half and of row g + 8 in its high half, and lane t = 1 those of 8 to 15; with 1, lanes t = 2 and 3 do. Positions ascend.
template <class T, unsigned kSelector>
__device__ __forceinline__ void multiply_add_sparse(
    float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t positions) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(positions), "n"(kSelector));
  } else {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(positions), "n"(kSelector));
  }
}

#endif

}  // namespace sparsekern::cuda
