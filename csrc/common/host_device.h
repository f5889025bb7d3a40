// Marks what is compiled for the host and for a CUDA device alike; without nvcc it says nothing.
#pragma once

#if defined(__CUDACC__)
#define SPARSEKERN_HOST_DEVICE __host__ __device__
#else
#define SPARSEKERN_HOST_DEVICE
#endif
