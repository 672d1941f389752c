// OpenMP with an explicit number of threads, and a serial path that touches no OpenMP at all.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <cstdint>

#if defined(__SSE__) || defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace wsss {

// Values under the smallest normal number count as 0 while this lives: a walk's far tails would crawl otherwise.
class FlushSubnormals {
 public:
#if defined(__SSE__) || defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// libgomp's threads do not survive fork(), and a region that expects them hangs: a forked process runs serially.
inline const pid_t kLoadedBy = getpid();
inline int usable_threads(int threads) { return threads > 1 && getpid() == kLoadedBy ? threads : 1; }

struct Team {
  int thread, threads;

  void barrier() const {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp barrier
    }
#endif
  }
  int64_t begin(int64_t count) const { return count * thread / threads; }
  int64_t end(int64_t count) const { return count * (thread + 1) / threads; }
};

// body(team) on every thread of a team; `threads` is a wish OpenMP may cut. body must not throw.
template <class Body>
void parallel(int threads, Body&& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const FlushSubnormals flush;
      body(Team{omp_get_thread_num(), omp_get_num_threads()});
    }
    return;
  }
#endif
  const FlushSubnormals flush;
  body(Team{0, 1});
}

}  // namespace wsss
