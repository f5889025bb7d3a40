// How every kernel is launched: without the <<<>>> of nvcc, so that csrc/testing can compile and run the same file on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace sparsekern::cuda {

// Throws if the launch was refused. What goes wrong while the kernel runs is reported by a later call, as with any CUDA code.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA launch failed: ") + cudaGetErrorString(error));
}

}  // namespace sparsekern::cuda
