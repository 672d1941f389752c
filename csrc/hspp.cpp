#include "hspp.h"

#include <algorithm>
#include <vector>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "hspp_kernels.h"

namespace wsss {

WSSS_FOR_EACH_ISA(extern const PyramidKernels pyramid_kernels;)

namespace {

const PyramidKernels& kernels() { return WSSS_CHOOSE_ISA(pyramid_kernels); }

constexpr double kValuesPerThread = 6e4;  // some tens of microseconds

std::vector<PyramidLevel> windows_of(int64_t height, int64_t width, const PyramidLevels& levels) {
  std::vector<PyramidLevel> result;
  for (int i = 0; i < levels.count; ++i) {
    const int rows = int(height / levels.levels[i]), columns = int(width / levels.levels[i]);
    result.push_back({rows, columns, int(height / rows), int(width / columns)});
  }
  return result;
}

int thread_count(int threads, const PyramidShape& shape) {
  return worthwhile_threads(usable_threads(threads), double(shape.planes) * double(shape.height * shape.width),
                            kValuesPerThread);
}

}  // namespace

int64_t pyramid_windows(int64_t height, int64_t width, const PyramidLevels& levels) {
  int64_t count = 0;
  for (const PyramidLevel& level : windows_of(height, width, levels)) count += level.windows();
  return count;
}

void hspp_cpu(const float* feats, float* out, int32_t* places, PyramidShape shape, const PyramidLevels& levels,
              int threads) {
  if (shape.planes == 0) return;
  const std::vector<PyramidLevel> windows = windows_of(shape.height, shape.width, levels);
  const int64_t pixels = shape.height * shape.width, count = pyramid_windows(shape.height, shape.width, levels);
  const double parts = levels.gamma + levels.count;
  threads = thread_count(threads, shape);
  const int64_t row = shape.width + kPyramidPadding;
  const Buffer<float> peaks(size_t(row) * threads);
  std::fill_n(peaks.get(), row * threads, 0.0f);
  parallel(threads, [&](const Team& team) {
    for (int64_t i = team.begin(shape.planes); i < team.end(shape.planes); ++i) {
      const float* const plane = feats + i * pixels;
      double total = levels.gamma * kernels().sum(plane, int(shape.height), int(shape.width)) / double(pixels);
      int32_t* place = places ? places + i * count : nullptr;
      for (const PyramidLevel& level : windows) {
        float* const own = peaks.get() + row * team.thread;
        total += kernels().maxima(plane, int(shape.width), level, own, place) / level.windows();
        if (place) place += level.windows();
      }
      out[i] = float(total / parts);
    }
  });
}

void hspp_backward_cpu(const float* grad, const int32_t* places, float* grad_feats, PyramidShape shape,
                       const PyramidLevels& levels, int threads) {
  if (shape.planes == 0) return;
  const std::vector<PyramidLevel> windows = windows_of(shape.height, shape.width, levels);
  const int64_t pixels = shape.height * shape.width, count = pyramid_windows(shape.height, shape.width, levels);
  const double parts = levels.gamma + levels.count;
  expect_writes(grad_feats, sizeof(float) * shape.planes * pixels);
  parallel(thread_count(threads, shape), [&](const Team& team) {
    for (int64_t i = team.begin(shape.planes); i < team.end(shape.planes); ++i) {
      float* const plane = grad_feats + i * pixels;
      std::fill_n(plane, pixels, float(grad[i] * (levels.gamma / double(pixels) / parts)));
      const int32_t* place = places + i * count;
      for (const PyramidLevel& level : windows) {
        const float share = float(grad[i] * (1 / (level.windows() * parts)));
        for (int w = 0; w < level.windows(); ++w) plane[*place++] += share;
      }
    }
  });
}

}  // namespace wsss
