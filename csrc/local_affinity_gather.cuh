// Gradient of local_affinity in its features, gathered: that of a pixel is a sum over its 2 K links, forward (to the
// neighbours it stores) and backward, of a coefficient h times sign(f_i - f_j) (l1) or u_j = f_j / |f_j| (cosine).
#pragma once
#include "local_affinity_device.cuh"

namespace wsss {
namespace {

constexpr int kWarp = 32;

struct Gather {
  const void *grad, *feats, *affinity;
  const float *scale, *norms;  // norms: cosine
  float* float_out;            // cosine: the gradient in u, [B, D, H, W]
  void* out;
  int64_t batch, plane;
  int dim, height, width, radius, count;
  int tiles, tiles_across;  // of an image, of its width
  bool exponential;         // the affinity is exp(-distance / scale)
  float per_distance;       // of the distance in what is summed over channels: l1 1 / D, cosine -1
};

// d loss / d sum of link k at `at` in an image's [K, H, W], `slope` that of the exponent.
template <class T>
__device__ float coefficient(const Gather& g, int64_t image, float slope, int64_t at) {
  at += image * g.count * g.plane;
  const float affinity = to_float(static_cast<const T*>(g.affinity)[at]);
  const float grad = to_float(static_cast<const T*>(g.grad)[at]);
  if (affinity == 0.0f) return 0.0f;
  return g.exponential ? grad * affinity * slope : grad;
}

__device__ inline float slope_of(const Gather& g, int64_t image) {
  return g.exponential ? -g.per_distance / g.scale[image] : 1.0f;
}

// 1 where v > 0, 1/2 where v = 0, 0 where v < 0 or v is no number: one instruction. Differences below 2^-128 count in
// part.
__device__ inline float step_at_0(float v) {
  return __saturatef(fmaf(v, 1.7014118e38f, 0.5f));  // 2^127
}

// What a link adds, and what the sum of it is worth: sign(v) = 2 step_at_0(v) - 1.
template <bool kCosine>
__device__ inline float add_link(float sum, float h, float here, float there) {
  return kCosine ? fmaf(h, there, sum) : fmaf(h, step_at_0(here - there), sum);
}
template <bool kCosine>
__device__ inline float gradient_of(float sum, float h_sum) {
  return kCosine ? sum : 2 * sum - h_sum;
}

template <class T, bool kCosine>
__device__ inline void write_gradient(const Gather& g, int64_t at, float value) {
  if (kCosine) {
    g.float_out[at] = value;
  } else {
    store(static_cast<T*>(g.out) + at, value);
  }
}

// Any radius: a thread owns a pixel and a few channels, and finds the rest in the caches.
namespace any_radius {

constexpr int kThreads = 128;
constexpr int kChannels = 8;

template <class T, bool kCosine>
__global__ void __launch_bounds__(kThreads, 6) gather_kernel(const Gather g) {
  const int64_t image = int(blockIdx.x) / g.tiles;
  const int64_t pixel = int64_t(int(blockIdx.x) % g.tiles) * kThreads + threadIdx.x;
  if (pixel >= g.plane) return;
  const int y = int(pixel / g.width), x = int(pixel - int64_t(y) * g.width);
  const float slope = slope_of(g, image);
  for (int first = int(blockIdx.y) * kChannels; first < g.dim; first += int(gridDim.y) * kChannels) {
    const int channels = min(kChannels, g.dim - first);
    const int64_t at = (image * g.dim + first) * g.plane + pixel;
    const T* const from = static_cast<const T*>(g.feats) + at;
    float here[kChannels], sum[kChannels] = {}, h_sum = 0;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) here[c] = c < channels ? to_float(from[c * g.plane]) : 0.0f;
    const auto add = [&](int64_t link_at, int64_t step) {
      const float h = coefficient<T>(g, image, slope, link_at);
      const float norm = kCosine ? g.norms[image * g.plane + pixel + step] : 1.0f;
      h_sum += h;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float feature = c < channels ? to_float(from[c * g.plane + step]) : 0.0f;
        sum[c] = add_link<kCosine>(sum[c], h, here[c], kCosine ? feature * norm : feature);
      }
    };
    int k = 0;
    for (int dy = 0; dy < g.radius; ++dy) {
      const int reach = stencil_reach(g.radius, dy);
      for (int dx = dy == 0 ? 1 : -reach; dx <= reach; ++dx, ++k) {
        const int64_t step = int64_t(dy) * g.width + dx, link = k * g.plane + pixel;
        if (y + dy < g.height && x + dx >= 0 && x + dx < g.width) add(link, step);
        if (y - dy >= 0 && x - dx >= 0 && x - dx < g.width) add(link - step, -step);
      }
    }
    for (int c = 0; c < channels; ++c) {
      write_gradient<T, kCosine>(g, at + c * g.plane, gradient_of<kCosine>(sum[c], h_sum));
    }
  }
}

}  // namespace any_radius

}  // namespace
}  // namespace wsss
