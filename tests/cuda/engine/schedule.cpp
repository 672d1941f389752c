#include "schedule.h"

#include <string>

#include "fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {

Thread* running = nullptr;
bool between = false;
uint64_t idle_turns = 0;
Ready ready;

namespace {

constexpr uint64_t kMostIdleTurns = 10'000'000;
constexpr unsigned kAtomicsATurn = 64;
constexpr size_t kSpareStack = 16 * 1024;

void* host_top = nullptr;
bool stopped = false;

bool is_between(const Thread& thread) { return thread.arrived && thread.block->cluster->phase == thread.arrival; }

void switch_to(Thread* next, void** from) {
  running = next;
  if (!next) return cuda_on_cpu_switch(from, host_top);
  threadIdx = next->index;
  blockIdx = next->block->index;
  between = is_between(*next);
  cuda_on_cpu_switch(from, next->top);
}

}  // namespace

void let_others_run() {
  Thread* const self = running;
  if (static_cast<unsigned char*>(__builtin_frame_address(0)) < self->stack + kSpareStack) {
    report_and_stop("a thread's variables take more than the " + std::to_string(kStackBytes) + " bytes of its stack",
                    __builtin_return_address(0));
  }
  self->atomics = 0;
  Thread* const next = ready.pop();
  if (next != self) switch_to(next, &self->top);
}

void wait(State state, const void* where) {
  running->state = state;
  running->waits_at = where;
  let_others_run();
}

bool run_threads() {
  stopped = false;
  switch_to(ready.pop(), &host_top);
  return stopped;
}

void stop() {
  stopped = true;
  void* abandoned;
  switch_to(nullptr, &abandoned);
  __builtin_unreachable();
}

void yield() {
  if (++idle_turns > kMostIdleTurns) {
    report_and_stop("divergent barrier: threads spin and nobody gets on", __builtin_return_address(0));
  }
  ready.push(running);
  let_others_run();
}

void fail(const char* what) { report_and_stop(what, __builtin_return_address(0)); }

void atomic_access(void* address, unsigned bytes, const void* where) {
  touch_atomically(address, bytes, kRead | kWrite, where);
}

void touch_atomically(const void* address, unsigned bytes, unsigned kind, const void* where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) {
    report_and_stop("misaligned: atomic operation of " + std::to_string(bytes) + " bytes", where);
  }
  touch(address, bytes, kind | kAtomic, where);
  if (++running->atomics > kAtomicsATurn) yield();
}

}  // namespace cuda_on_cpu
