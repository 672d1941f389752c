// Whose turn it is. One thread runs until it waits or ends; the order of the others is the test's choice.
#pragma once
#include <cstddef>
#include <random>
#include <utility>
#include <vector>

#include "grid.h"

namespace cuda_on_cpu {

extern uint64_t idle_turns;  // of threads that spin, since anyone last got on

// Who can go on, the next one first.
class Ready {
 public:
  void reset(size_t most, Order order, uint32_t seed) {
    size_t slots = 1;
    while (slots <= most) slots *= 2;
    slots_.assign(slots, nullptr);
    first_ = count_ = 0;
    order_ = order;
    random_.seed(seed);
  }
  void push(Thread* thread) {
    thread->state = State::kReady;
    at(count_++) = thread;
  }
  template <class Each>
  void push_all(size_t count, Each each) {
    idle_turns = 0;
    for (size_t i = 0; i < count; ++i) push(each(order_ == Order::kReversed ? count - 1 - i : i));
  }
  Thread* pop() {
    if (count_ == 0) return nullptr;
    if (order_ == Order::kRandom) std::swap(at(0), at(random_() % count_));
    Thread* const thread = at(0);
    ++first_;
    --count_;
    return thread;
  }

 private:
  Thread*& at(size_t i) { return slots_[(first_ + i) & (slots_.size() - 1)]; }

  std::vector<Thread*> slots_;
  size_t first_ = 0, count_ = 0;
  Order order_ = Order::kForward;
  std::minstd_rand random_;
};

extern Ready ready;

// From the host's stack: comes back when nobody can go on, or after stop(). True after the latter.
bool run_threads();

// Comes back when the running thread's turn comes again; what changed its state has put it among the ready ones.
void let_others_run();
void wait(State state, const void* where);

// The other lanes of its warp no longer wait for the running thread.
void leave_warp();

}  // namespace cuda_on_cpu
