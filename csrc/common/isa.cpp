#include "isa.h"

#include <cstdlib>

namespace wsss {

const char* isa_name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline"; }

static Isa best_isa() {
#ifdef WSSS_X86_KERNELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kBaseline;
}

static Isa chosen_isa() {
  const Isa best = best_isa();
  const char* const wanted = std::getenv("WSSS_CPU_ISA");
  if (!wanted || !*wanted) return best;
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= best && std::string(wanted) == isa_name(isa)) return isa;
  }
  throw std::runtime_error(
      "WSSS_CPU_ISA must be baseline, avx2 or avx512 and no more than this processor and build offer (" +
      std::string(isa_name(best)) + "), got " + wanted);
}

Isa cpu_isa() {
  static const Isa isa = chosen_isa();
  return isa;
}

}  // namespace wsss
