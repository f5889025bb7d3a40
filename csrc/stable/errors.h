// What torch says when a call of its stable C interface fails: the words, where this torch can give them, instead of the call's text.
// To be included before any other header of torch's stable interface, whose inline functions check their calls by this macro.
#pragma once

#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();  // from torch 2.13 on

namespace sparsekern {

[[noreturn]] inline void throw_torch_error(const char* call) {
  if (torch_exception_get_what_without_backtrace == nullptr) {
    throw std::runtime_error(std::string("torch failed inside an op of sparsekern, in ") + call);
  }
  throw std::runtime_error(torch_exception_get_what_without_backtrace());
}

}  // namespace sparsekern

#undef TORCH_ERROR_CODE_CHECK
// clang-format off
#define TORCH_ERROR_CODE_CHECK(call) if ((call) != TORCH_SUCCESS) { ::sparsekern::throw_torch_error(#call); }
// clang-format on
