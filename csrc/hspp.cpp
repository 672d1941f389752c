#include "hspp.h"

#include <algorithm>
#include <numeric>
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

// Whether every window of `coarse` is made of whole windows of `fine`.
bool made_of(const PyramidLevel& coarse, const PyramidLevel& fine) {
  return coarse.window_rows % fine.window_rows == 0 && coarse.window_columns % fine.window_columns == 0;
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
  const auto finest = std::max_element(windows.begin(), windows.end(),
                                       [](const auto& a, const auto& b) { return a.windows() < b.windows(); });
  const int64_t before = std::accumulate(windows.begin(), finest, int64_t(0),
                                         [](int64_t sum, const auto& level) { return sum + level.windows(); });
  const int64_t bands = std::max_element(windows.begin(), windows.end(), [](const auto& a, const auto& b) {
                          return a.rows < b.rows;
                        })->rows;
  const int64_t maxima = count * kPyramidPlanes, each = maxima + bands * shape.width + kPyramidPadding;
  threads = thread_count(threads, shape);
  const Buffer<float> values(each * threads);
  const Buffer<int32_t> their_places(places ? each * threads : 0);
  std::fill_n(values.get(), each * threads, 0.0f);
  std::fill_n(their_places.get(), places ? each * threads : 0, 0);
  parallel(threads, [&](const Team& team) {
    const PyramidMaxima own = {values.get() + each * team.thread,
                               places ? their_places.get() + each * team.thread : nullptr};
    const PyramidMaxima scratch = own + maxima, finest_own = own + before * kPyramidPlanes;
    const int64_t end = team.end(shape.planes);
    for (int64_t first = team.begin(shape.planes); first < end; first += kPyramidPlanes) {
      const int planes = int(std::min<int64_t>(kPyramidPlanes, end - first));
      double totals[kPyramidPlanes] = {};
      const auto merged = [&](const PyramidLevel& level) { return &level != &*finest && made_of(level, *finest); };
      for (int p = 0; p < planes; ++p) {
        const float* const plane = feats + (first + p) * pixels;
        PyramidMaxima found = own + p;
        for (const PyramidLevel& level : windows) {
          if (!merged(level)) kernels().find(plane, int(shape.width), level, scratch, found);
          found = found + int64_t(level.windows()) * kPyramidPlanes;
        }
        totals[p] = levels.gamma * kernels().sum(plane, int(shape.height), int(shape.width)) / double(pixels);
      }
      PyramidMaxima found = own;
      for (const PyramidLevel& level : windows) {
        if (merged(level)) kernels().merge(*finest, finest_own, level, found);
        kernels().add_means(found.values, level.windows(), totals);
        found = found + int64_t(level.windows()) * kPyramidPlanes;
      }
      for (int p = 0; p < planes; ++p) {
        out[first + p] = float(totals[p] / parts);
        if (!places) continue;
        for (int64_t w = 0; w < count; ++w) places[(first + p) * count + w] = own.places[w * kPyramidPlanes + p];
      }
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
