// How a walk of `steps` steps is evaluated: as that many products, or as a truncated Chebyshev series of P^steps.
#pragma once
#include <cstddef>
#include <vector>

#include "random_walk.h"

namespace wsss {

struct WalkMethod {
  bool in_double;              // float32's own rounding would exceed tol
  int64_t steps;               // of the power form
  std::vector<double> series;  // coefficients of T_0 ... T_n, every second one 0; empty for the power form
};

WalkMethod choose_walk_method(const WalkOptions& options);

// The backward always runs through the series, which for few steps is exact.
std::vector<double> gradient_series(const WalkOptions& options);
bool gradient_in_double(const WalkOptions& options);

}  // namespace wsss
