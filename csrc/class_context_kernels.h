// The parts of class_context.cpp that are compiled once for each instruction set.
#pragma once
#include <cstdint>

namespace wsss {

// Pixels of one class side by side: class c has [starts[c], starts[c + 1]).
struct ContextPixels {
  const int32_t* pixels;
  const float* weights;
  const int32_t* starts;
  int classes;
};

struct ContextKernels {
  // Channels of features, [H W] = plane values each -> their weighted sums for each class, times scales[class]: those
  // of a class side by side, the classes `stride` values apart.
  void (*gather)(const ContextPixels& pixels, const float* feats, int64_t plane, int64_t channels, const float* scales,
                 float* out, int64_t stride);
  // The transpose: values of the classes to their pixels; the others are left alone.
  void (*scatter)(const ContextPixels& pixels, const float* grad, const float* scales, int64_t stride, int64_t plane,
                  int64_t channels, float* feats);
};

}  // namespace wsss
