// Affinity between each pixel and its neighbours (Ahn and Kwak, CVPR 2018, sec. 3.2).
//   l1:      out[b,k,y,x] = exp(-distance / scale), distance = mean_d |f[b,d,y,x] - f[b,d,y+dy_k,x+dx_k]|
//   cosine:  out[b,k,y,x] = max(cos, 0); with the automatic scale exp(-(1 - cos) / scale)
// 0 where the neighbour is outside the map, or the pair outside the border the caller asked for.
#pragma once
#include <cstddef>
#include <cstdint>

namespace wsss {

struct FeatureShape {
  int64_t batch, dim, height, width;
};

enum class AffinityMetric { kL1, kCosine };

struct AffinityOptions {
  int radius;
  AffinityMetric metric;
  bool automatic;  // scale = the image's mean distance over all in-map pairs (1 where that is 0)
  double scale;    // otherwise; l1 only
  bool cropped;    // also 0 for sources in the last radius - 1 rows or the first or last radius - 1 columns
};

void local_affinity_cpu(const float* feats,  // [B, D, H, W] contiguous
                        float* out,          // [B, K, H, W] every element is written
                        float* scale,        // [B] the scale that was used
                        FeatureShape shape, const AffinityOptions& options, int threads);

// The scale is a constant for the gradient. The workspace is one image's [K, H, W].
void local_affinity_backward_cpu(const float* grad,      // [B, K, H, W]
                                 const float* feats,     // [B, D, H, W]
                                 const float* affinity,  // [B, K, H, W] as returned
                                 const float* scale,     // [B] as returned
                                 float* grad_feats,      // [B, D, H, W] every element is written
                                 FeatureShape shape, const AffinityOptions& options, int threads);

// The same on the current CUDA device (all pointers on it), in stream order: no allocation, no wait for the device, and
// the same result every time. Workspaces are in bytes; streams are cudaStream_t.
enum class DataType { kFloat32, kFloat16, kBFloat16 };

size_t local_affinity_cuda_workspace(FeatureShape shape, const AffinityOptions& options, DataType type);

void local_affinity_cuda(const void* feats,  // [B, D, H, W] contiguous
                         void* out,          // [B, K, H, W] of the same type, every element is written
                         float* scale,       // [B] the scale that was used
                         FeatureShape shape, const AffinityOptions& options, DataType type, void* workspace,
                         void* stream);

size_t local_affinity_backward_cuda_workspace(FeatureShape shape, const AffinityOptions& options, DataType type);

void local_affinity_backward_cuda(const void* grad,      // [B, K, H, W], as all below but the scale of one type
                                  const void* feats,     // [B, D, H, W]
                                  const void* affinity,  // [B, K, H, W] as returned
                                  const float* scale,    // [B] as returned
                                  void* grad_feats,      // [B, D, H, W] every element is written
                                  FeatureShape shape, const AffinityOptions& options, DataType type, void* workspace,
                                  void* stream);

}  // namespace wsss
