// k-means by Lloyd's iterations, seeded by greedy k-means++ (Arthur and Vassilvitskii, SODA 2007), as scikit-learn does
// it.
//   labels[i] = argmin_j |x_i - c_j|, ties to the lowest j;  c_j = mean of the rows labelled j
//   until no label changes, or sum_j |c_j - its last place|^2 <= tol * mean variance of the columns
// Distances are left out where the triangle inequality shows that a label stays (Elkan, ICML 2003; the centers' bounds
// in groups after Ding et al., ICML 2015), and only rows that change their label touch the sums of the centers: what
// remains of a late iteration is a pass over the bounds. The labels are those of the plain algorithm.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace wsss {

struct KMeansProblem {
  const float* x;  // [N, D] contiguous
  int64_t rows, dim, clusters;
  const float* start;   // [k, D] first centers, or null: k-means++ from the draws
  const double* draws;  // in [0, 1): for each run 1 + (k - 1) * kmeans_trials(k) of them
  int64_t runs;         // the one of least inertia is kept; 1 with a start
  int64_t* labels;      // [N] of the final centers
  float* centers;       // [k, D]
  double* inertia;      // sum of squared distances to the centers
  int64_t* iterations;  // of the run that was kept
};

int64_t kmeans_trials(int64_t clusters);  // candidates for each further center: 2 + log(k)

// Every problem is solved as if it were alone, with the same result for any number of threads. -> the first whose rows
// are not finite or their squares not in float32 (nothing of it is written then), or -1. Workspace of a problem: a
// centred copy of x and one in bytes, 100 to 300 bytes a row and 20 a value of the centers.
int64_t kmeans_cpu(const std::vector<KMeansProblem>& problems, int64_t iterations, double tol, int threads);

}  // namespace wsss
