// OpenMP with an explicit number of threads, and a serial path that touches no OpenMP at all.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace wsss {

// Values under the smallest normal number count as 0 while this lives: a walk's far tails would crawl otherwise.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// libgomp's threads do not survive fork(), and a region that expects them hangs: a forked process runs serially.
inline const pid_t kLoadedBy = getpid();
inline int usable_threads(int threads) { return threads > 1 && getpid() == kLoadedBy ? threads : 1; }

// No more threads than find `grain` units of work each: meeting costs more than it brings on small maps.
inline int worthwhile_threads(int threads, double work, double grain) {
  return std::max(1, int(std::min<double>(threads, work / grain)));
}

// Threads meet here between two steps of a walk, microseconds apart. Waiting never sleeps: on a busy machine a sleeping
// thread is woken milliseconds late, once a step. It yields instead when the wait grows long.
class Barrier {
 public:
  void wait(int threads) {
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < 4096) {
        pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

struct Team {
  int thread, threads;
  Barrier* meeting;

  void barrier() const {
    if (threads > 1) meeting->wait(threads);
  }
  int64_t begin(int64_t count) const { return count * thread / threads; }
  int64_t end(int64_t count) const { return count * (thread + 1) / threads; }
};

inline Team alone() { return {0, 1, nullptr}; }

// body(team) on every thread of a team; `threads` is a wish OpenMP may cut. body must not throw.
template <class Body>
void parallel(int threads, Body&& body) {
#ifdef _OPENMP
  if (threads > 1) {
    Barrier meeting;
#pragma omp parallel num_threads(threads)
    {
      const FlushSubnormals flush;
      body(Team{omp_get_thread_num(), omp_get_num_threads(), &meeting});
    }
    return;
  }
#endif
  const FlushSubnormals flush;
  body(alone());
}

}  // namespace wsss
