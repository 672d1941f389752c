#include "class_context_kernels.h"
#include "common/simd.h"

namespace wsss {
namespace WSSS_ISA {
namespace {

void gather(const ContextPixels& pixels, const float* feats, const float* scales, float* out, int64_t stride) {
  for (int c = 0; c < pixels.classes; ++c) {
    double sums[4] = {};  // four chains: an addition takes some cycles
    const int begin = pixels.starts[c], end = pixels.starts[c + 1];
    for (int i = begin; i < end; ++i) sums[(i - begin) % 4] += double(pixels.weights[i]) * feats[pixels.pixels[i]];
    double sum = 0;
    for (int i = 0; i < 4; ++i) sum += sums[i];
    out[c * stride] = float(sum * scales[c]);
  }
}

void scatter(const ContextPixels& pixels, const float* grad, const float* scales, int64_t stride, float* feats) {
  for (int c = 0; c < pixels.classes; ++c) {
    const float value = grad[c * stride] * scales[c];
    for (int i = pixels.starts[c]; i < pixels.starts[c + 1]; ++i) feats[pixels.pixels[i]] = value * pixels.weights[i];
  }
}

}  // namespace

extern const ContextKernels context_kernels;
const ContextKernels context_kernels = {&gather, &scatter};

}  // namespace WSSS_ISA
}  // namespace wsss
