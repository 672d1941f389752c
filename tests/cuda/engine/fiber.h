// A stack of its own and the switch to it.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the engine switches stacks on x86-64 Linux only"
#endif

namespace cuda_on_cpu {

constexpr size_t kStackBytes = 128 * 1024;

// Keeps the registers that a call must keep on the current stack, its top in *from, and goes on where *to left off.
extern "C" __attribute__((visibility("hidden"))) void cuda_on_cpu_switch(void** from, void* to);

// A top to switch to first: entry(), which must not return, on the stack below `end` (a multiple of 16).
inline void* new_fiber(unsigned char* end, void (*entry)()) {
  void** top = reinterpret_cast<void**>(end);
  *--top = nullptr;  // where entry would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  return top;
}

}  // namespace cuda_on_cpu
