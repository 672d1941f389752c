// What device code says to the other threads: barriers, warp exchanges, atomics.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "qualifiers.h"
#include "vector_types.h"

// Set anew whenever another thread runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// What calls the engine is always inlined, so that a report names the line of the kernel.
namespace cuda_on_cpu {

enum class BlockVote { kNone, kOr, kAnd, kCount };
enum class WarpOp {
  kBarrier,
  kShuffle,
  kBallot,
  kAny,
  kAll,
  kAdd,
  kMin,
  kMax,
  kMinSigned,
  kMaxSigned,
  kAnd,
  kOr,
  kXor
};

int block_barrier(BlockVote vote, int predicate);
// Waits for the lanes of `mask`. kShuffle: the value of lane `from`; the others: of all values.
uint64_t warp_exchange(WarpOp op, unsigned mask, uint64_t value, int from);
int lane();
void yield();
void fail(const char* what);  // ends the launch with a report

// What an access without an instruction of its own does before: checks, and the tracing of races.
void atomic_access(void* address, unsigned bytes, const void* where);

// g++ instruments every plain access; these do their own.
#define CUDA_ON_CPU_UNCHECKED __attribute__((noinline, no_sanitize("thread")))

template <class T, class Update>
CUDA_ON_CPU_UNCHECKED T atomic_update(T* address, Update update) {
  atomic_access(address, sizeof(T), __builtin_return_address(0));
  const T before = *address;
  *address = update(before);
  return before;
}

template <class T>
__forceinline__ T shuffle(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_exchange(WarpOp::kShuffle, mask, bits, from);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

__forceinline__ void check_width(int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("a shuffle's width must be a power of 2 up to 32");
}

template <class T>
using Value = typename std::common_type<T>::type;  // keeps an argument out of deduction

}  // namespace cuda_on_cpu

__forceinline__ void __syncthreads() { cuda_on_cpu::block_barrier(cuda_on_cpu::BlockVote::kNone, 0); }
__forceinline__ int __syncthreads_or(int predicate) {
  return cuda_on_cpu::block_barrier(cuda_on_cpu::BlockVote::kOr, predicate);
}
__forceinline__ int __syncthreads_and(int predicate) {
  return cuda_on_cpu::block_barrier(cuda_on_cpu::BlockVote::kAnd, predicate);
}
__forceinline__ int __syncthreads_count(int predicate) {
  return cuda_on_cpu::block_barrier(cuda_on_cpu::BlockVote::kCount, predicate);
}

__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_on_cpu::warp_exchange(cuda_on_cpu::WarpOp::kBarrier, mask, 0, 0);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  return unsigned(cuda_on_cpu::warp_exchange(cuda_on_cpu::WarpOp::kBallot, mask, predicate != 0, 0));
}
__forceinline__ int __any_sync(unsigned mask, int predicate) {
  return int(cuda_on_cpu::warp_exchange(cuda_on_cpu::WarpOp::kAny, mask, predicate != 0, 0));
}
__forceinline__ int __all_sync(unsigned mask, int predicate) {
  return int(cuda_on_cpu::warp_exchange(cuda_on_cpu::WarpOp::kAll, mask, predicate != 0, 0));
}

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  cuda_on_cpu::check_width(width);
  const int first = cuda_on_cpu::lane() & ~(width - 1);
  return cuda_on_cpu::shuffle(mask, value, first | (lane & (width - 1)));
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  cuda_on_cpu::check_width(width);
  const int own = cuda_on_cpu::lane(), first = own & ~(width - 1);
  return cuda_on_cpu::shuffle(mask, value, own - first >= int(delta) ? own - int(delta) : own);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  cuda_on_cpu::check_width(width);
  const int own = cuda_on_cpu::lane(), last = own | (width - 1);
  return cuda_on_cpu::shuffle(mask, value, last - own >= int(delta) ? own + int(delta) : own);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  cuda_on_cpu::check_width(width);
  const int own = cuda_on_cpu::lane(), from = own ^ lane_mask;
  return cuda_on_cpu::shuffle(mask, value, from >= 0 && from <= (own | (width - 1)) ? from : own);
}

#define CUDA_ON_CPU_REDUCE(name, op)                                                      \
  __forceinline__ unsigned name(unsigned mask, unsigned value) {                          \
    return unsigned(cuda_on_cpu::warp_exchange(cuda_on_cpu::WarpOp::op, mask, value, 0)); \
  }
CUDA_ON_CPU_REDUCE(__reduce_add_sync, kAdd)
CUDA_ON_CPU_REDUCE(__reduce_min_sync, kMin)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, kMax)
CUDA_ON_CPU_REDUCE(__reduce_and_sync, kAnd)
CUDA_ON_CPU_REDUCE(__reduce_or_sync, kOr)
CUDA_ON_CPU_REDUCE(__reduce_xor_sync, kXor)
#undef CUDA_ON_CPU_REDUCE
__forceinline__ int __reduce_add_sync(unsigned mask, int value) {
  return int(__reduce_add_sync(mask, unsigned(value)));
}
__forceinline__ int __reduce_min_sync(unsigned mask, int value) {
  return int(cuda_on_cpu::warp_exchange(cuda_on_cpu::WarpOp::kMinSigned, mask, unsigned(value), 0));
}
__forceinline__ int __reduce_max_sync(unsigned mask, int value) {
  return int(cuda_on_cpu::warp_exchange(cuda_on_cpu::WarpOp::kMaxSigned, mask, unsigned(value), 0));
}

// One thread runs at a time, so memory needs no fence.
__forceinline__ void __threadfence() {}
__forceinline__ void __threadfence_block() {}
__forceinline__ void __threadfence_system() {}
__forceinline__ void __nanosleep(unsigned) { cuda_on_cpu::yield(); }
__forceinline__ void __trap() { cuda_on_cpu::fail("__trap()"); }

#define CUDA_ON_CPU_ATOMIC(name, expression)                                            \
  template <class T>                                                                    \
  __forceinline__ T name(T* address, cuda_on_cpu::Value<T> value) {                     \
    return cuda_on_cpu::atomic_update(address, [=](T old) -> T { return expression; }); \
  }
CUDA_ON_CPU_ATOMIC(atomicAdd, old + value)
CUDA_ON_CPU_ATOMIC(atomicSub, old - value)
CUDA_ON_CPU_ATOMIC(atomicMax, old < value ? value : old)
CUDA_ON_CPU_ATOMIC(atomicMin, value < old ? value : old)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value)
CUDA_ON_CPU_ATOMIC(atomicAnd, old& value)
CUDA_ON_CPU_ATOMIC(atomicXor, old ^ value)
CUDA_ON_CPU_ATOMIC(atomicExch, ((void)old, value))
CUDA_ON_CPU_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
CUDA_ON_CPU_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef CUDA_ON_CPU_ATOMIC
template <class T>
__forceinline__ T atomicCAS(T* address, cuda_on_cpu::Value<T> compare, cuda_on_cpu::Value<T> value) {
  return cuda_on_cpu::atomic_update(address, [=](T old) -> T { return old == compare ? value : old; });
}
