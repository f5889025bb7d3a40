// A product by torch's own library, for wrappers whose loop over kernels needs one: cuBLAS, without a call through Python.
#pragma once

#include "cuda/tensors.h"

#ifdef SPARSEKERN_SIMT
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif

namespace sparsekern::cuda {

// Adds left @ right to `out`, in the precision that torch is set to; `begins` treats `out` as zeros. The device is the current one.
inline void add_product(const Tensor& out, const Tensor& left, const Tensor& right, bool begins) {
#ifdef SPARSEKERN_SIMT
  const auto multiply = aoti_torch_cpu_addmm_out;
#else
  const auto multiply = aoti_torch_cuda_addmm_out;
#endif
  TORCH_ERROR_CODE_CHECK(multiply(out.get(), out.get(), left.get(), right.get(), begins ? 0.0 : 1.0, 1.0));
}

}  // namespace sparsekern::cuda
