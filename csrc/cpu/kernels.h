// Every CPU kernel: torch-free, on raw pointers to contiguous row-major data. One file an op implements it; register_cpu.cpp
// turns tensors into these arguments. Kernels throw std::invalid_argument (ValueError in Python) on values they refuse.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace sparsekern::cpu {

void gram_symmetrize_(float* gram, int64_t features, const Executor& executor);

}  // namespace sparsekern::cpu
