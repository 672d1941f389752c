// Hybrid spatial pyramid pooling (Ru et al., IJCAI 2021): of each plane the mean and, for each level r, the mean of the
// maxima of windows of (H / r) x (W / r) pixels, rows and columns that fill no window left out.
//   out = (gamma * mean + sum over levels of the mean of maxima) / (gamma + number of levels)
#pragma once
#include <cstdint>

namespace wsss {

struct PyramidShape {
  int64_t planes, height, width;  // height * width < 2^31
};

struct PyramidLevels {
  const int64_t* levels;  // 1 <= each <= height, width
  int count;
  double gamma;
};

int64_t pyramid_windows(int64_t height, int64_t width, const PyramidLevels& levels);

void hspp_cpu(const float* feats,  // [planes, H, W] contiguous
              float* out,          // [planes]
              int32_t* places,     // [planes, windows] of the first maximum of each, pixels; or null: not wanted
              PyramidShape shape, const PyramidLevels& levels, int threads);

void hspp_backward_cpu(const float* grad, const int32_t* places, float* grad_feats, PyramidShape shape,
                       const PyramidLevels& levels, int threads);

}  // namespace wsss
