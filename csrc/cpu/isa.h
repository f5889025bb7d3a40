// Instruction sets of the kernels. Chosen at run time by cpuid, or by SPARSEKERN_CPU_ISA, which is used or refused.
#pragma once

#include <string>

namespace sparsekern::cpu {

// avx512_bf16_emulated is never chosen by default: it runs the kernels of avx512_bf16 with vdpbf16ps written out in AVX-512F.
enum class Isa { scalar, avx2, avx512, avx512_bf16_emulated, avx512_bf16 };

// Returns the ISA to use for this call. Throws std::invalid_argument if SPARSEKERN_CPU_ISA names none, or one that the CPU lacks.
Isa current_isa();
// Returns the best ISA of this CPU.
Isa detected_isa();
const char* isa_name(Isa isa);

}  // namespace sparsekern::cpu

// Per-function targets: no file is compiled with global -m flags, so that nothing outside these functions can fault on an older
// CPU. A kernel is written once as a SPARSEKERN_INLINE body. A small entry function per target inlines it and so vectorises it.
#if defined(__x86_64__)
#define SPARSEKERN_X86 1
#define SPARSEKERN_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt")))
#define SPARSEKERN_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512cd,avx2,fma,f16c,bmi,bmi2,popcnt,prefer-vector-width=512")))
#else
#define SPARSEKERN_X86 0
#endif
#define SPARSEKERN_INLINE inline __attribute__((always_inline))
#define SPARSEKERN_INLINE_LAMBDA __attribute__((always_inline))  // follows the parameters of a lambda that such a body calls
