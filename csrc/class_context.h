// Class contexts of an image (MCIC, Fan and Zhang, TPAMI 2022): the weighted mean of the features of a class's pixels.
//   prototypes[c, d] = sum over p of class c of w[p] f[d, p] / (sum of w + 1e-5),   sums[c] = sum of w
// A pixel is of one class or of none.
#pragma once
#include <cstdint>

namespace wsss {

struct ContextShape {
  int64_t batch, classes, dim, pixels;
};

void class_context_cpu(const float* feats,      // [B, D, H W]
                       const float* weights,    // [B, H W]
                       const int32_t* classes,  // [B, H W], -1: of none
                       float* prototypes,       // [B, C, D] every element is written
                       float* sums,             // [B, C]
                       ContextShape shape, int threads);

void class_context_backward_cpu(const float* grad,  // [B, C, D] of the prototypes
                                const float* weights, const int32_t* classes, const float* sums,
                                float* grad_feats,  // [B, D, H W] every element is written
                                ContextShape shape, int threads);

}  // namespace wsss
