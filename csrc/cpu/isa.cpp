#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace sparsekern::cpu {

namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16_emulated, Isa::avx512_bf16};

Isa detect() {
#if SPARSEKERN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512cd");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::scalar;
}

Isa requested(const std::string& name) {
  for (Isa isa : kAll) {
    if (name != isa_name(isa)) continue;
    const Isa needed = isa == Isa::avx512_bf16_emulated ? Isa::avx512 : isa;
    if (needed > detected_isa()) {
      throw std::invalid_argument(
          "SPARSEKERN_CPU_ISA: expected at most " + std::string(isa_name(detected_isa())) + ", which this CPU supports, got '" +
          name + "'");
    }
    return isa;
  }
  throw std::invalid_argument(
      "SPARSEKERN_CPU_ISA: expected scalar, avx2, avx512, avx512_bf16 or avx512_bf16_emulated, got '" + name + "'");
}

}  // namespace

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa current_isa() {
  const char* name = std::getenv("SPARSEKERN_CPU_ISA");
  return name == nullptr || *name == '\0' ? detected_isa() : requested(name);
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16_emulated: return "avx512_bf16_emulated";
    case Isa::avx512_bf16: return "avx512_bf16";
  }
  return "unknown";
}

}  // namespace sparsekern::cpu
