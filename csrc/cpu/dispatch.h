// One kernel body, compiled for each instruction set, and the choice between them at run time.
#pragma once

#include "cpu/isa.h"

namespace sparsekern::cpu {

// `kBody` is a SPARSEKERN_INLINE function; its loops are vectorised anew in each entry it is inlined into.
template <auto kBody>
struct Entries;

template <class Result, class... Arguments, Result (*kBody)(Arguments...)>
struct Entries<kBody> {
  using Function = Result (*)(Arguments...);

  static Result scalar(Arguments... arguments) { return kBody(arguments...); }
#if SPARSEKERN_X86
  SPARSEKERN_AVX2 static Result avx2(Arguments... arguments) { return kBody(arguments...); }
  SPARSEKERN_AVX512 static Result avx512(Arguments... arguments) { return kBody(arguments...); }
#endif

  static Function choose() {
    [[maybe_unused]] const Isa isa = current_isa();
#if SPARSEKERN_X86
    if (isa >= Isa::avx512) return &avx512;
    if (isa >= Isa::avx2) return &avx2;
#endif
    return &scalar;
  }
};

}  // namespace sparsekern::cpu
