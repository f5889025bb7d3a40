// Compiles one kernel body for each instruction set and chooses between them at run time.
#pragma once

#include "cpu/isa.h"

namespace sparsekern::cpu {

// The bodies are SPARSEKERN_INLINE functions; each entry inlines them and so vectorises their loops for its target.
template <auto kBaseline, auto kAvx2, auto kAvx512>
struct TargetEntries;

template <
    class Result, class... Arguments, Result (*kBaseline)(Arguments...), Result (*kAvx2)(Arguments...),
    Result (*kAvx512)(Arguments...)>
struct TargetEntries<kBaseline, kAvx2, kAvx512> {
  using Function = Result (*)(Arguments...);

  static Result scalar(Arguments... arguments) { return kBaseline(arguments...); }
#if SPARSEKERN_X86
  SPARSEKERN_AVX2 static Result avx2(Arguments... arguments) { return kAvx2(arguments...); }
  SPARSEKERN_AVX512 static Result avx512(Arguments... arguments) { return kAvx512(arguments...); }
#endif

  static Function choose([[maybe_unused]] Isa isa = current_isa()) {
#if SPARSEKERN_X86 && !defined(SPARSEKERN_WITHOUT_AVX512)  // a sanitized build for a CPU that could not run them
    if (isa >= Isa::avx512) return &avx512;
#endif
#if SPARSEKERN_X86
    if (isa >= Isa::avx2) return &avx2;
#endif
    return &scalar;
  }
};

// One body for every target.
template <auto kBody>
using Entries = TargetEntries<kBody, kBody, kBody>;

}  // namespace sparsekern::cpu
