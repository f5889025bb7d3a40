// Helper shared by the wrappers of the ops that solve with a damped Gram matrix.
#pragma once

#include <tuple>

#include "cpu/tensors.h"

namespace sparsekern::cpu {

// Returns the result written by f, and the damping returned by f.
template <class F>
std::tuple<Tensor, Tensor> with_damping_used(Tensor result, const Tensor& gram, const F& f) {
  Tensor damping_used = torch::stable::new_empty(gram, {}, ScalarType::Double);
  *static_cast<double*>(damping_used.mutable_data_ptr()) = f(float_data(result));
  return {result, damping_used};
}

}  // namespace sparsekern::cpu
