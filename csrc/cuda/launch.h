// Kernel launches without the <<<>>> of nvcc, so that csrc/testing can compile and run the same file on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace sparsekern::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA ") + what + " failed: " + cudaGetErrorString(error));
}

namespace detail {

constexpr size_t kSharedWithoutAsking = 48 * 1024;

template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, bool cooperative, cudaStream_t stream,
    Arguments... arguments) {
  if (shared_bytes > kSharedWithoutAsking) {
    check_cuda(
        cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        "shared memory request");
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch");
}

}  // namespace detail

// Launches a kernel; throws if the launch is refused. Errors of a running kernel are reported by a later call, as with any CUDA
// code.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments... arguments) {
  detail::launch(kernel, grid, block, 0, false, stream, arguments...);
}

// With dynamic shared memory, which the kernel reaches by dynamic_shared<T>().
template <class... Parameters, class... Arguments>
void launch_shared(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  detail::launch(kernel, grid, block, shared_bytes, false, stream, arguments...);
}

// Cooperative launch: all blocks are resident at once, so that they can meet at grid_barrier. The grid must fit: see
// resident_blocks.
template <class... Parameters, class... Arguments>
void launch_cooperative(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  detail::launch(kernel, grid, block, shared_bytes, true, stream, arguments...);
}

// Returns the number of blocks of a kernel that the current device holds at once.
template <class... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared_bytes) {
  int device = 0, processors = 0, blocks = 0;
  check_cuda(cudaGetDevice(&device), "device query");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device query");
  if (shared_bytes > detail::kSharedWithoutAsking) {
    check_cuda(
        cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        "shared memory request");
  }
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), "occupancy query");
  return int64_t{processors} * blocks;
}

// Returns the largest shared memory of a block on the current device.
inline size_t most_shared_bytes() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "device query");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device query");
  return static_cast<size_t>(bytes);
}

#ifdef SPARSEKERN_SIMT
template <class T>
T* dynamic_shared() {
  return static_cast<T*>(simt::dynamic_shared());
}
#elif defined(__CUDACC__)
template <class T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char sparsekern_dynamic_shared[];
  return reinterpret_cast<T*>(sparsekern_dynamic_shared);
}
#endif

#if defined(SPARSEKERN_SIMT) || defined(__CUDACC__)
// All threads of all blocks of a cooperative launch wait here for each other. `arrivals` is a word in device memory, zero before
// the launch; `round` counts the barriers of a kernel from 1. What was written before is seen by every thread afterwards.
__device__ inline void grid_barrier(unsigned* arrivals, unsigned round) {
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    __threadfence();
    atomicAdd(arrivals, 1u);
    const unsigned expected = round * gridDim.x * gridDim.y * gridDim.z;
    while (*static_cast<volatile unsigned*>(arrivals) < expected) __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}
#endif

}  // namespace sparsekern::cuda
