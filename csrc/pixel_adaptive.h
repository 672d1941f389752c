// Pixel-adaptive refinement (PAMR, Araslanov and Roth, CVPR 2020; PAR, Ru et al., CVPR 2022): a pixel takes the
// weighted sum of 8 neighbours at each dilation, again and again.
//   m(p) <- sum over k of w(p, k) m(clamp(p + offset_k)),   offsets: rings of 8, dilation by dilation, row by row
//   PAMR: w = softmax_k(-mean_c |x_c(q) - x_c(p)| / (1e-8 + 0.1 sd_c(p))), sd over the rings and a centre each
//   PAR:  w = softmax_k(-mean_c (|x_c(q) - x_c(p)| / (sd_c(p) + 1e-8) / 0.3)^2) + 0.01 softmax_k(of the distance alike)
// Weights are kept in 16 bits and divided by what the rounding made of their sum.
#pragma once
#include <cstdint>

namespace wsss {

inline constexpr int kMaxDilations = 32;

struct AdaptiveShape {
  int64_t batch, channels, height, width;
};

struct AdaptiveOptions {
  bool par;              // else PAMR
  const int* dilations;  // >= 1
  int count;             // 1 ... kMaxDilations
  int64_t iterations;
};

// Workspace: of one image its weights (16 bits each), a copy of its maps and a few rows for each thread.
void pixel_adaptive_cpu(const float* image,  // [B, 3, H, W]
                        const float* maps,   // [B, C, H, W]
                        float* out,          // [B, C, H, W] every element is written
                        AdaptiveShape shape, const AdaptiveOptions& options, int threads);

// The gradient of a sum of grad * out in the maps.
void pixel_adaptive_backward_cpu(const float* grad,   // [B, C, H, W]
                                 const float* image,  // [B, 3, H, W]
                                 float* grad_maps,    // [B, C, H, W] every element is written
                                 AdaptiveShape shape, const AdaptiveOptions& options, int threads);

}  // namespace wsss
