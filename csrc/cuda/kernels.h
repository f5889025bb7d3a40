// Every CUDA launcher, on raw pointers to contiguous row-major device data: one .cu file an op; register_cuda.cpp passes tensors in.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sparsekern::cuda {

void gram_symmetrize_(float* gram, int64_t features, cudaStream_t stream);

}  // namespace sparsekern::cuda
