// What the forms of the walk on the GPU share.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace wsss {

// affinity^beta, 0 where there is no link. Rounding the exponent costs |log2 of the weight| 4e-8 of the weight, at the
// most 2e-8: a large power of a small affinity is off by more of itself, but is nothing.
__device__ inline float link_weight(float affinity, float beta) {
  return affinity <= 0 ? 0.0f : exp2f(beta * log2f(affinity));
}
__device__ inline double link_weight(double affinity, double beta) {
  return affinity <= 0 ? 0.0 : exp2(beta * log2(affinity));
}

// Coefficients 0 ... last of the series of P^steps from the first that is not 0 (random_walk_series.cpp has the law).
template <class T>
__device__ void write_series(T* series, double first, int64_t steps, int64_t last) {
  double value = first;
  for (int64_t k = 0; k <= last; ++k) {
    if ((steps - k) % 2 != 0) {
      series[k] = 0;
      continue;
    }
    series[k] = T(value);
    const double j = double(steps - k) / 2;
    value *= (k == 0 ? 2 : 1) * j / (double(steps) - j + 1);
  }
}

}  // namespace wsss
