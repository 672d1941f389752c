#include "kmeans.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <mutex>

#include "kmeans_solver.h"

namespace wsss {
namespace {

constexpr double kProductsPerThread = 2e5;

bool solve(const KMeansProblem& problem, int64_t iterations, double tol, int threads) {
  kmeans::Solver solver(problem, tol, threads);
  parallel(threads, [&](const Team& team) {
    solver.prepare(team);
    if (!solver.finite()) return;
    for (int64_t run = 0; run < problem.runs; ++run) {
      solver.run(team, run, iterations);
      team.barrier();
    }
  });
  return solver.finite();
}

double products(const KMeansProblem& problem) {
  return double(problem.rows) * double(problem.dim) * double(problem.clusters);
}

int worthwhile(const KMeansProblem& problem, int threads) {
  return worthwhile_threads(threads, products(problem), kProductsPerThread);
}

}  // namespace

int64_t kmeans_trials(int64_t clusters) { return 2 + int64_t(std::log(double(clusters))); }

int64_t kmeans_cpu(const std::vector<KMeansProblem>& problems, int64_t iterations, double tol, int threads) {
  threads = usable_threads(threads);
  const int64_t count = int64_t(problems.size());
  std::atomic<int64_t> next{0}, bad{count};
  const auto note = [&](int64_t i) {
    int64_t first = bad;
    while (i < first && !bad.compare_exchange_weak(first, i)) {
    }
  };
  // Problems above a thread's share one after another by the whole team, the others side by side by a thread each,
  // largest first.
  double all = 0;
  for (const KMeansProblem& problem : problems) all += products(problem);
  std::vector<int64_t> small;
  for (int64_t i = 0; i < count; ++i) {
    if (worthwhile(problems[i], threads) < threads || products(problems[i]) * threads <= all) {
      small.push_back(i);
    } else if (!solve(problems[i], iterations, tol, threads)) {
      note(i);
    }
  }
  std::stable_sort(small.begin(), small.end(),
                   [&](int64_t a, int64_t b) { return products(problems[a]) > products(problems[b]); });
  // Those that would keep one thread busy while the others wait, too.
  size_t first = 0;
  for (; first < small.size() && (small.size() - first) % threads != 0; ++first) {
    const KMeansProblem& problem = problems[small[first]];
    if (worthwhile(problem, threads) < threads) break;
    if (!solve(problem, iterations, tol, threads)) note(small[first]);
  }
  small.erase(small.begin(), small.begin() + first);
  const int team = int(std::min<int64_t>(threads, int64_t(small.size())));
  if (team == 1) {
    for (const int64_t i : small) {
      if (!solve(problems[i], iterations, tol, worthwhile(problems[i], threads))) note(i);
    }
  } else if (team > 1) {
    std::mutex failing;
    std::exception_ptr failure;  // memory that there is not
    parallel(team, [&](const Team&) {
      for (int64_t i = next++; i < int64_t(small.size()); i = next++) {
        try {
          if (!solve(problems[small[i]], iterations, tol, 1)) note(small[i]);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(failing);
          failure = std::current_exception();
        }
      }
    });
    if (failure) std::rethrow_exception(failure);
  }
  return bad < count ? int64_t(bad) : -1;
}

}  // namespace wsss
