// What g++ -fsanitize=thread calls ahead of every access, and -fsanitize=alignment,bounds,... where one is wrong. The
// sanitizers' own libraries are not linked. The names are fixed by the compiler.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "fiber.h"
#include "grid.h"

namespace cuda_on_cpu {
namespace {

inline bool on_own_stack(const void* address) {
  return size_t(static_cast<const unsigned char*>(address) - running->stack) < kStackBytes;
}

inline void check(const void* address, size_t bytes, unsigned kind, const void* where) {
  if (!running || on_own_stack(address)) return;
  touch(address, bytes, kind, where);
}

inline void check_aligned(const void* address, size_t bytes, unsigned kind, const void* where) {
  if (!running || on_own_stack(address)) return;
  if (reinterpret_cast<uintptr_t>(address) % bytes) {
    report_and_stop("misaligned: access of " + std::to_string(bytes) + " bytes at an address that is no multiple",
                    where);
  }
  touch(address, bytes, kind, where);
}

// A volatile access may be the loop that waits for another thread.
inline void check_volatile(const void* address, size_t bytes, unsigned kind, const void* where) {
  if (!running || on_own_stack(address)) return;
  touch_atomically(address, unsigned(bytes), kind, where);
}

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};

struct TypeMismatch {
  SourceLocation location;
  const TypeDescriptor* type;
  unsigned char log_alignment, kind;
};

[[gnu::noinline]] void undefined(const std::string& what, const void* where) {
  if (running) report_and_stop(what, where);
}

}  // namespace
}  // namespace cuda_on_cpu

#define HERE __builtin_return_address(0)
#define HOOK extern "C" __attribute__((visibility("hidden"))) void

#define SIZED_HOOKS(bytes)                                                                                             \
  HOOK __tsan_read##bytes(void* address) { cuda_on_cpu::check_aligned(address, bytes, cuda_on_cpu::kRead, HERE); }     \
  HOOK __tsan_write##bytes(void* address) { cuda_on_cpu::check_aligned(address, bytes, cuda_on_cpu::kWrite, HERE); }   \
  HOOK __tsan_unaligned_read##bytes(void* address) { cuda_on_cpu::check(address, bytes, cuda_on_cpu::kRead, HERE); }   \
  HOOK __tsan_unaligned_write##bytes(void* address) { cuda_on_cpu::check(address, bytes, cuda_on_cpu::kWrite, HERE); } \
  HOOK __tsan_volatile_read##bytes(void* address) {                                                                    \
    cuda_on_cpu::check_volatile(address, bytes, cuda_on_cpu::kRead, HERE);                                             \
  }                                                                                                                    \
  HOOK __tsan_volatile_write##bytes(void* address) {                                                                   \
    cuda_on_cpu::check_volatile(address, bytes, cuda_on_cpu::kWrite, HERE);                                            \
  }                                                                                                                    \
  HOOK __tsan_unaligned_volatile_read##bytes(void* address) {                                                          \
    cuda_on_cpu::check_volatile(address, bytes, cuda_on_cpu::kRead, HERE);                                             \
  }                                                                                                                    \
  HOOK __tsan_unaligned_volatile_write##bytes(void* address) {                                                         \
    cuda_on_cpu::check_volatile(address, bytes, cuda_on_cpu::kWrite, HERE);                                            \
  }
SIZED_HOOKS(1)
SIZED_HOOKS(2)
SIZED_HOOKS(4)
SIZED_HOOKS(8)
SIZED_HOOKS(16)

HOOK __tsan_read_range(void* address, size_t bytes) { cuda_on_cpu::check(address, bytes, cuda_on_cpu::kRead, HERE); }
HOOK __tsan_write_range(void* address, size_t bytes) { cuda_on_cpu::check(address, bytes, cuda_on_cpu::kWrite, HERE); }
HOOK __tsan_init() {}
HOOK __tsan_vptr_update(void*, void*) {}

// In sources, memcpy of a size known only at run time is an ordinary call; runner.py renames it to this.
#define MEMORY(result) extern "C" __attribute__((visibility("hidden"))) result

MEMORY(void*) cuda_on_cpu_memcpy(void* to, const void* from, size_t bytes) {
  cuda_on_cpu::check(from, bytes, cuda_on_cpu::kRead, HERE);
  cuda_on_cpu::check(to, bytes, cuda_on_cpu::kWrite, HERE);
  return std::memcpy(to, from, bytes);
}
MEMORY(void*) cuda_on_cpu_memmove(void* to, const void* from, size_t bytes) {
  cuda_on_cpu::check(from, bytes, cuda_on_cpu::kRead, HERE);
  cuda_on_cpu::check(to, bytes, cuda_on_cpu::kWrite, HERE);
  return std::memmove(to, from, bytes);
}
MEMORY(void*) cuda_on_cpu_memset(void* to, int value, size_t bytes) {
  cuda_on_cpu::check(to, bytes, cuda_on_cpu::kWrite, HERE);
  return std::memset(to, value, bytes);
}

// std::atomic and the guards of static variables in host code. Threads of the host are not watched.
#define ATOMIC_HOOKS(bits, Type)                                                                                      \
  MEMORY(Type) __tsan_atomic##bits##_load(const volatile Type* a, int) { return __atomic_load_n(a, 5); }              \
  MEMORY(void) __tsan_atomic##bits##_store(volatile Type* a, Type v, int) { __atomic_store_n(a, v, 5); }              \
  MEMORY(Type) __tsan_atomic##bits##_exchange(volatile Type* a, Type v, int) { return __atomic_exchange_n(a, v, 5); } \
  MEMORY(Type) __tsan_atomic##bits##_fetch_add(volatile Type* a, Type v, int) { return __atomic_fetch_add(a, v, 5); } \
  MEMORY(Type) __tsan_atomic##bits##_fetch_sub(volatile Type* a, Type v, int) { return __atomic_fetch_sub(a, v, 5); } \
  MEMORY(int) __tsan_atomic##bits##_compare_exchange_strong(volatile Type* a, Type* expected, Type v, int, int) {     \
    return __atomic_compare_exchange_n(a, expected, v, false, 5, 5);                                                  \
  }                                                                                                                   \
  MEMORY(int) __tsan_atomic##bits##_compare_exchange_weak(volatile Type* a, Type* expected, Type v, int, int) {       \
    return __atomic_compare_exchange_n(a, expected, v, false, 5, 5);                                                  \
  }
ATOMIC_HOOKS(8, uint8_t)
ATOMIC_HOOKS(32, uint32_t)
ATOMIC_HOOKS(64, uint64_t)
HOOK __tsan_atomic_thread_fence(int) {}
HOOK __tsan_atomic_signal_fence(int) {}

HOOK __ubsan_handle_type_mismatch_v1(cuda_on_cpu::TypeMismatch* data, uintptr_t address) {
  const unsigned alignment = 1u << data->log_alignment;
  cuda_on_cpu::undefined("misaligned: access as " + std::string(data->type->name) + " at an address that is " +
                             std::to_string(address % alignment) + " modulo " + std::to_string(alignment),
                         HERE);
}
HOOK __ubsan_handle_out_of_bounds(void*, uintptr_t index) {
  cuda_on_cpu::undefined("out of bounds: index " + std::to_string(intptr_t(index)) + " of an array", HERE);
}
HOOK __ubsan_handle_shift_out_of_bounds(void*, uintptr_t, uintptr_t by) {
  cuda_on_cpu::undefined("undefined: shift by " + std::to_string(intptr_t(by)), HERE);
}
HOOK __ubsan_handle_divrem_overflow(void*, uintptr_t, uintptr_t) {
  cuda_on_cpu::undefined("undefined: integer division by 0, or of the lowest number by -1", HERE);
}
#define OVERFLOW_HOOK(name, sign)                                        \
  HOOK __ubsan_handle_##name##_overflow(void*, uintptr_t, uintptr_t) {   \
    cuda_on_cpu::undefined("undefined: signed overflow of " sign, HERE); \
  }
OVERFLOW_HOOK(add, "+")
OVERFLOW_HOOK(sub, "-")
OVERFLOW_HOOK(mul, "*")
HOOK __ubsan_handle_negate_overflow(void*, uintptr_t) {
  cuda_on_cpu::undefined("undefined: signed overflow of a negation", HERE);
}
