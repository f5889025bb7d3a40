// Replaces the toolkit's <cuda_runtime.h>, so that a .cu file that launches through cuda/launch.h compiles with any C++ compiler
// and runs on a CPU (fibers.h). Half-precision arithmetic and PTX are not provided: kernels convert through common/dtype.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "simt/fibers.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __align__(bytes) alignas(bytes)
#define __shared__ static  // blocks run one after the other, so that one copy suffices (cooperative kernels: dynamic_shared)
#define __launch_bounds__(...)

using std::max;
using std::min;

constexpr int warpSize = 32;

// ---- vectors, aligned as on the device: a misaligned access is found by UndefinedBehaviorSanitizer

#define SIMT_VECTORS(type, name, align2, align4)                   \
  struct alignas(align2) name##2 { type x, y; };                   \
  struct alignas(align4) name##4 { type x, y, z, w; };             \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

SIMT_VECTORS(float, float, 8, 16)
SIMT_VECTORS(int, int, 8, 16)
SIMT_VECTORS(unsigned, uint, 8, 16)
SIMT_VECTORS(unsigned short, ushort, 4, 8)
SIMT_VECTORS(unsigned char, uchar, 2, 4)
#undef SIMT_VECTORS

template <class T>
inline T __ldg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcs(const T* address) {
  return *address;
}
template <class T>
inline void __stcg(T* address, T value) {
  *address = value;
}
template <class T>
inline void __stcs(T* address, T value) {
  *address = value;
}

// ---- bits

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline int __clzll(long long value) { return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }

// Byte i of the result is the byte of `low` and `high` that nibble i of the selector names.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

template <class To, class From>
inline To simt_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float value) { return simt_bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return simt_bit_cast<int>(value); }
inline float __uint_as_float(unsigned value) { return simt_bit_cast<float>(value); }
inline float __int_as_float(int value) { return simt_bit_cast<float>(value); }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }

// ---- atomics: threads run one at a time

template <class T>
inline T simt_exchange(T* address, T value) {
  const T before = *address;
  *address = value;
  simt::Scheduler::running->progressed();
  return before;
}
inline int atomicAdd(int* address, int value) { return simt_exchange(address, *address + value); }
inline unsigned atomicAdd(unsigned* address, unsigned value) { return simt_exchange(address, *address + value); }
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return simt_exchange(address, *address + value);
}
inline int atomicSub(int* address, int value) { return simt_exchange(address, *address - value); }
template <class T>
inline T atomicOr(T* address, T value) {
  return simt_exchange(address, static_cast<T>(*address | value));
}
template <class T>
inline T atomicAnd(T* address, T value) {
  return simt_exchange(address, static_cast<T>(*address & value));
}
template <class T>
inline T atomicMax(T* address, T value) {
  return simt_exchange(address, std::max(*address, value));
}
template <class T>
inline T atomicMin(T* address, T value) {
  return simt_exchange(address, std::min(*address, value));
}
template <class T>
inline T atomicExch(T* address, T value) {
  return simt_exchange(address, value);
}
template <class T>
inline T atomicCAS(T* address, T expected, T value) {
  return simt_exchange(address, *address == expected ? value : *address);
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { simt::Scheduler::running->spin(); }

// ---- blocks

inline void __syncthreads() { simt::block_barrier(); }
inline int __syncthreads_count(int predicate) { return static_cast<int>(simt::block_barrier(predicate != 0)); }
inline int __syncthreads_or(int predicate) { return simt::block_barrier(predicate != 0) != 0; }
inline int __syncthreads_and(int predicate) { return simt::block_barrier(predicate == 0) == 0; }

// ---- warps

namespace simt {

template <class T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8, "a warp function carries at most 8 bytes a lane");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Returns the value of the lane that `source(lane)` names within the segment of `width` lanes, or the lane's own if that is
// outside.
template <class T, class Source>
T shuffle(unsigned mask, T value, int width, const Source& source) {
  return warp_meeting(mask, to_word(value), [&](const uint64_t* words, unsigned lane, unsigned present) {
    const int segment = static_cast<int>(lane) / width * width;
    const int from = source(static_cast<int>(lane) - segment) + segment;
    if (from < segment || from >= segment + width) return value;
    if ((present >> from & 1) == 0) Scheduler::running->fail("a shuffle reads from a lane that the mask does not name");
    return from_word<T>(words[from]);
  });
}

template <class T, class Combine>
T reduce(unsigned mask, T value, const Combine& combine) {
  return warp_meeting(mask, to_word(value), [&](const uint64_t* words, unsigned lane, unsigned present) {
    T result = from_word<T>(words[lane]);
    for (unsigned other = 0; other < kWarp; ++other) {
      if (other != lane && (present >> other & 1)) result = combine(result, from_word<T>(words[other]));
    }
    return result;
  });
}

inline unsigned ballot(unsigned mask, bool predicate) {
  return warp_meeting(mask, predicate, [](const uint64_t* words, unsigned, unsigned present) {
    unsigned bits = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) bits |= (present >> lane & 1) && words[lane] != 0 ? 1u << lane : 0u;
    return bits;
  });
}

}  // namespace simt

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return simt::shuffle(mask, value, width, [=](int) { return source & (width - 1); });
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return simt::shuffle(mask, value, width, [=](int lane) { return lane ^ bits; });
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return simt::shuffle(mask, value, width, [=](int lane) { return lane - static_cast<int>(by); });
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return simt::shuffle(mask, value, width, [=](int lane) { return lane + static_cast<int>(by); });
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::ballot(mask, false); }
inline unsigned __ballot_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate == 0) == 0; }
template <class T>
inline T __reduce_add_sync(unsigned mask, T value) {
  return simt::reduce(mask, value, std::plus<T>());
}
template <class T>
inline T __reduce_or_sync(unsigned mask, T value) {
  return simt::reduce(mask, value, std::bit_or<T>());
}
template <class T>
inline T __reduce_and_sync(unsigned mask, T value) {
  return simt::reduce(mask, value, std::bit_and<T>());
}
template <class T>
inline T __reduce_max_sync(unsigned mask, T value) {
  return simt::reduce(mask, value, [](T a, T b) { return std::max(a, b); });
}
template <class T>
inline T __reduce_min_sync(unsigned mask, T value) {
  return simt::reduce(mask, value, [](T a, T b) { return std::min(a, b); });
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value) {
  return simt::warp_meeting(mask, simt::to_word(value), [](const uint64_t* words, unsigned own, unsigned present) {
    unsigned bits = 0;
    for (unsigned lane = 0; lane < simt::kWarp; ++lane)
      bits |= (present >> lane & 1) && words[lane] == words[own] ? 1u << lane : 0u;
    return bits;
  });
}

// ---- the host side

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeCooperative = 2 };
union cudaLaunchAttributeValue {
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace simt {

// A device small enough for kernels to meet its limits at test sizes.
constexpr int kProcessors = 4, kBlocksPerProcessor = 2;
constexpr size_t kSharedPerBlock = 227 * 1024;

inline bool refused(const dim3& grid, const dim3& block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
         threads > 1024 || shared_bytes > kSharedPerBlock;
}

}  // namespace simt

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const bool cooperative =
      config->numAttrs != 0 && config->attrs[0].id == cudaLaunchAttributeCooperative && config->attrs[0].val.cooperative;
  const uint64_t blocks = uint64_t{config->gridDim.x} * config->gridDim.y * config->gridDim.z;
  if (simt::refused(config->gridDim, config->blockDim, config->dynamicSmemBytes) ||
      (cooperative && blocks > simt::kProcessors * simt::kBlocksPerProcessor)) {
    return cudaErrorInvalidConfiguration;
  }
  const std::function<void()> body = [&] { kernel(arguments...); };
  simt::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, cooperative, body);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrMultiProcessorCount ? simt::kProcessors : static_cast<int>(simt::kSharedPerBlock),
         cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = simt::kBlocksPerProcessor, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
