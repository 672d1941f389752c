// Which of the compiled instruction sets this processor runs. WSSS_CPU_ISA=baseline|avx2|avx512 asks for less.
#pragma once
#include <stdexcept>
#include <string>

namespace wsss {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa cpu_isa();  // std::runtime_error where WSSS_CPU_ISA names what this processor or build lacks
const char* isa_name(Isa isa);

// Declarations once per instruction set, and the choice among what they declare.
#ifdef WSSS_X86_KERNELS
#define WSSS_FOR_EACH_ISA(declarations) \
  namespace baseline {                  \
  declarations                          \
  }                                     \
  namespace avx2 {                      \
  declarations                          \
  }                                     \
  namespace avx512 {                    \
  declarations                          \
  }
#define WSSS_CHOOSE_ISA(name) \
  (cpu_isa() == Isa::kAvx512 ? avx512::name : cpu_isa() == Isa::kAvx2 ? avx2::name : baseline::name)
#else
#define WSSS_FOR_EACH_ISA(declarations) \
  namespace baseline {                  \
  declarations                          \
  }
#define WSSS_CHOOSE_ISA(name) baseline::name
#endif

}  // namespace wsss
