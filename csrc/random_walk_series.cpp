#include "random_walk_series.h"

namespace wsss {

namespace {

// Below these, up to 256 steps, float32's own rounding is larger than what was asked for and the walk runs in double.
constexpr double kSinglePowerTol = 1e-5;
constexpr double kSingleChebyshevTol = 2e-5;
constexpr double kSingleGradientTol = 5e-5;
// A truncated series is off by its tail times the largest entry of T_k(P), which reached 24 (no small bound is known).
constexpr double kTailSafety = 32;
constexpr double kSingleGradientTail = 1e-7;
constexpr double kDoubleGradientTail = 1e-11;

// In longer walks what rounding takes from a step, which gets ever smaller, adds up.
double growth(const WalkOptions& o) { return o.steps > 256 ? double(o.steps) / 256 : 1; }

// P^steps = sum of c_k T_k(P), up to a tail; T_k the Chebyshev polynomials, c_k = 2^(1-steps) binomial(steps, (steps -
// k) / 2), c_0 half of that. All are >= 0 and sum to 1: the law of the distance a simple random walk has gone after
// `steps` steps. What is kept is divided by its sum, so that constant maps stay exact.
std::vector<double> chebyshev_series(int64_t steps, double tail) {
  std::vector<double> c;  // k = steps % 2, then every second
  double value = steps % 2 ? 1 : 0.5, total = 0;
  for (int64_t k = steps % 2; k <= steps; k += 2) {
    c.push_back(value);
    total += value;
    const double j = double(steps - k) / 2;
    value *= (k == 0 ? 2 : 1) * j / (double(steps) - j + 1);
    if (value < total * 1e-18) break;
  }
  double left_out = 0;
  while (c.size() > 1 && left_out + c.back() <= tail * total) {
    left_out += c.back();
    c.pop_back();
  }
  std::vector<double> all(std::size_t(steps % 2) + 2 * c.size() - 1, 0.0);
  for (std::size_t i = 0; i < c.size(); ++i) all[std::size_t(steps % 2) + 2 * i] = c[i] / (total - left_out);
  return all;
}

}  // namespace

WalkMethod choose_walk_method(const WalkOptions& o) {
  WalkMethod method{false, o.steps, {}};
  if (o.solver != WalkSolver::kPower && o.steps > 1) {
    std::vector<double> series = chebyshev_series(o.steps, o.tol / kTailSafety);
    // A Chebyshev step adds into a sum: about a twentieth dearer than a product.
    if (o.solver == WalkSolver::kChebyshev || double(series.size()) * 1.05 < double(o.steps)) method.series = series;
  }
  method.in_double = o.tol < (method.series.empty() ? kSinglePowerTol : kSingleChebyshevTol) * growth(o);
  return method;
}

std::vector<double> gradient_series(const WalkOptions& options) {
  return chebyshev_series(options.steps, gradient_in_double(options) ? kDoubleGradientTail : kSingleGradientTail);
}

bool gradient_in_double(const WalkOptions& o) {
  return o.solver == WalkSolver::kPower || o.tol < kSingleGradientTol * growth(o);
}

}  // namespace wsss
