#include "class_context_kernels.h"
#include "common/simd.h"

namespace wsss {
namespace WSSS_ISA {
namespace {

constexpr int kChannels = 4;  // of a map of 41 x 41 they fit the first-level cache

// R channels at a time share a pixel's place and weight; two chains each, for an addition takes some cycles.
template <int R>
void gather(const ContextPixels& pixels, const float* feats, int64_t plane, const float* scales, float* out,
            int64_t stride) {
  for (int c = 0; c < pixels.classes; ++c) {
    double even[R] = {}, odd[R] = {};
    const int begin = pixels.starts[c], end = pixels.starts[c + 1];
    const auto add = [&](int i, double* sums) {
      const double weight = pixels.weights[i];
      const float* const at = feats + pixels.pixels[i];
      unroll<0, R>([&](auto r) __attribute__((always_inline)) { sums[r] += weight * at[r * plane]; });
    };
    for (int i = begin; i + 1 < end; i += 2) {
      add(i, even);
      add(i + 1, odd);
    }
    if ((end - begin) % 2 != 0) add(end - 1, even);
    unroll<0, R>([&](auto r)
                     __attribute__((always_inline)) { out[c * stride + r] = float((even[r] + odd[r]) * scales[c]); });
  }
}

template <int R>
void scatter(const ContextPixels& pixels, const float* grad, const float* scales, int64_t stride, int64_t plane,
             float* feats) {
  for (int c = 0; c < pixels.classes; ++c) {
    float values[R];
    unroll<0, R>([&](auto r) __attribute__((always_inline)) { values[r] = grad[c * stride + r] * scales[c]; });
    for (int i = pixels.starts[c]; i < pixels.starts[c + 1]; ++i) {
      float* const at = feats + pixels.pixels[i];
      unroll<0, R>([&](auto r) __attribute__((always_inline)) { at[r * plane] = values[r] * pixels.weights[i]; });
    }
  }
}

void gather(const ContextPixels& pixels, const float* feats, int64_t plane, int64_t channels, const float* scales,
            float* out, int64_t stride) {
  int64_t d = 0;
  for (; d + kChannels <= channels; d += kChannels) {
    gather<kChannels>(pixels, feats + d * plane, plane, scales, out + d, stride);
  }
  for (; d < channels; ++d) gather<1>(pixels, feats + d * plane, plane, scales, out + d, stride);
}

void scatter(const ContextPixels& pixels, const float* grad, const float* scales, int64_t stride, int64_t plane,
             int64_t channels, float* feats) {
  int64_t d = 0;
  for (; d + kChannels <= channels; d += kChannels) {
    scatter<kChannels>(pixels, grad + d, scales, stride, plane, feats + d * plane);
  }
  for (; d < channels; ++d) scatter<1>(pixels, grad + d, scales, stride, plane, feats + d * plane);
}

}  // namespace

extern const ContextKernels context_kernels;
const ContextKernels context_kernels = {&gather, &scatter};

}  // namespace WSSS_ISA
}  // namespace wsss
