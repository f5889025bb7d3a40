// Marks functions that are compiled for the host and for CUDA devices; expands to nothing without nvcc.
#pragma once

#if defined(__CUDACC__)
#define SPARSEKERN_HOST_DEVICE __host__ __device__
#else
#define SPARSEKERN_HOST_DEVICE
#endif
