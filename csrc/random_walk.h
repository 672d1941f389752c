// Random walk of maps over a local affinity (Ahn and Kwak, CVPR 2018, sec. 3.4).
//   W_ij = affinity_ij^beta, W_ii = 1, no link where the affinity is 0;  P = D^-1 W;  out = P^steps maps
// computed in the difference form (P x)_i = x_i + sum_j W_ij (x_j - x_i) / d_i, which keeps constant maps exactly,
// either as `steps` products or as a truncated Chebyshev series of P^steps.
#pragma once
#include <cstdint>

namespace wsss {

struct WalkShape {
  int64_t batch, channels, height, width;
};

enum class WalkSolver { kAuto, kPower, kChebyshev };

struct WalkOptions {
  int radius;
  double beta;
  int64_t steps;
  WalkSolver solver;
  double tol;  // largest error allowed, in units of the map's maximum
};

void random_walk_cpu(const float* maps,      // [B, C, H, W] contiguous
                     const float* affinity,  // [B, K, H, W]
                     float* out,             // [B, C, H, W] every element is written
                     WalkShape shape, const WalkOptions& options, int threads);

// Gradients of sum(grad * out); a null pointer is a gradient nobody wants. States are not stored but run backwards
// (x_{k-1} = 2 P x_k - x_{k+1}), so the memory does not grow with the number of steps.
void random_walk_backward_cpu(const float* grad,      // [B, C, H, W]
                              const float* maps,      // [B, C, H, W]
                              const float* affinity,  // [B, K, H, W]
                              float* grad_maps,       // [B, C, H, W] or null
                              float* grad_affinity,   // [B, K, H, W] or null
                              WalkShape shape, const WalkOptions& options, int threads);

}  // namespace wsss
