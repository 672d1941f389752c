// Mean field of a fully connected CRF with Gaussian edge potentials (Kraehenbuehl and Koltun, NIPS 2011).
//   Q = softmax(-unary); `iterations` times: E = -unary + sum over both terms of compat n F(n Q), Q = softmax(E) over
//   labels
// F filters with a Gaussian over (x, y), or over (x, y, r, g, b), on the permutohedral lattice; n = 1 / sqrt(F(1) +
// 1e-20).
#pragma once
#include <cstddef>
#include <cstdint>

namespace wsss {

struct CrfShape {
  int64_t batch, labels, height, width;
};

struct CrfOptions {
  int64_t iterations;
  float gaussian_sigma[2], gaussian_compat;    // x, y in pixels; a compat of 0 switches the term off
  float bilateral_sigma[5], bilateral_compat;  // x, y in pixels; r, g, b
};

// std::invalid_argument where the sigmas are too small for the size.
void dense_crf_cpu(const float* image,  // [B, 3, H, W], 0..255
                   const float* unary,  // [B, C, H, W] negative log probabilities
                   float* out,          // [B, C, H, W] every element is written
                   CrfShape shape, const CrfOptions& options, int threads);

// Dense energy (Tang et al., ECCV 2018): loss = -<S, F(S)> / B, S = probs * roi, F the bilateral filter without n.
// slope = -2 F(S) roi / B is the published gradient, which takes the filter as symmetric.
void dense_energy_cpu(const float* image,  // [B, 3, H, W], 0..255
                      const float* probs,  // [B, C, H, W]
                      const float* roi,    // [B, H, W] or null: 1
                      float* loss,         // one number
                      float* slope,        // [B, C, H, W], every element is written, or null
                      CrfShape shape, const float* sigma /* x, y, r, g, b */, int threads);

// The same on the current CUDA device (all pointers on it), in stream order: no allocation, no wait for the device. As
// many images go through it side by side as the workspace has room for; what they give does not depend on it. The
// workspace that is asked for has room for all of them, or for what 2 GB hold, and always for one.
size_t dense_crf_cuda_workspace(CrfShape shape, const CrfOptions& options);
void dense_crf_cuda(const float* image, const float* unary, float* out, CrfShape shape, const CrfOptions& options,
                    void* workspace, size_t workspace_bytes, void* stream /* a cudaStream_t */);

size_t dense_energy_cuda_workspace(CrfShape shape, const float* sigma);
void dense_energy_cuda(const float* image, const float* probs, const float* roi, float* loss, float* slope,
                       CrfShape shape, const float* sigma, void* workspace, size_t workspace_bytes, void* stream);

}  // namespace wsss
