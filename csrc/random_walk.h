// Random walk of maps over a local affinity (Ahn and Kwak, CVPR 2018, sec. 3.4).
//   W_ij = affinity_ij^beta, W_ii = 1, no link where the affinity is 0;  P = D^-1 W;  out = P^steps maps
// computed in the difference form (P x)_i = x_i + sum_j W_ij (x_j - x_i) / d_i, which keeps constant maps exactly,
// either as `steps` products or as a truncated Chebyshev series of P^steps.
#pragma once
#include <cstddef>
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

// The same on the current CUDA device (all pointers on it), in stream order: no allocation, no wait for the device.
enum class WalkForm {
  kCluster,  // one launch, the blocks of an image in a thread-block cluster: radius 5, float32
  kGrid,     // one launch, the blocks of an image in a cooperative grid: the same, larger maps
  kPhases    // any radius, size and precision: one cooperative launch where the map is small enough, else one a product
};

struct CudaWalkPlan {
  WalkForm form;
  size_t workspace;  // bytes
  // The forms with the weights on the chip:
  bool half_weights;  // float16, with the degree of the rounded values
  int maps;           // of one image, an item
  int blocks;         // an item's, a band of rows each
  int items_at_once;
  int threads, shared;  // a block's; bytes
};

// How this device walks such maps; depends on nothing else, so it can be kept.
CudaWalkPlan plan_random_walk_cuda(WalkShape shape, const WalkOptions& options);

void random_walk_cuda(const float* maps,      // [B, C, H, W]
                      const float* affinity,  // [B, K, H, W]
                      float* out,             // [B, C, H, W] every element is written
                      WalkShape shape, const WalkOptions& options, const CudaWalkPlan& plan,
                      void* workspace,  // plan.workspace bytes
                      void* stream);    // a cudaStream_t

size_t random_walk_backward_cuda_workspace(WalkShape shape, const WalkOptions& options, bool wants_affinity);

void random_walk_backward_cuda(const float* grad,      // [B, C, H, W]
                               const float* maps,      // [B, C, H, W]
                               const float* affinity,  // [B, K, H, W]
                               float* grad_maps,       // [B, C, H, W] or null
                               float* grad_affinity,   // [B, K, H, W] or null
                               WalkShape shape, const WalkOptions& options, void* workspace, void* stream);

}  // namespace wsss
