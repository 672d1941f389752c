#include "hspp.h"

#include <algorithm>
#include <limits>
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

// The maxima of a level from those of one it is made of; of places that tie the first of the plane, as in a scan of it.
// No branches: no processor foresees which of a few maxima is the largest.
void merge(const PyramidLevel& fine, const float* values, const int32_t* places, const PyramidLevel& coarse,
           float* merged, int32_t* merged_places) {
  constexpr int32_t kNowhere = std::numeric_limits<int32_t>::max();
  const int down = coarse.window_rows / fine.window_rows, across = coarse.window_columns / fine.window_columns;
  for (int w = 0; w < coarse.windows(); ++w) {
    const int first = w / coarse.columns * down * fine.columns + w % coarse.columns * across;
    float largest = values[first];
    for (int y = 0; y < down; ++y) {
      for (int x = 0; x < across; ++x) {
        const float value = values[first + y * fine.columns + x];
        largest = value > largest ? value : largest;
      }
    }
    merged[w] = largest;
    if (!places) continue;
    int32_t place = kNowhere;
    for (int y = 0; y < down; ++y) {
      for (int x = 0; x < across; ++x) {
        const int i = first + y * fine.columns + x;
        const int32_t elsewhere = int32_t(values[i] >= largest) - 1;  // all bits or none
        place = std::min(place, (places[i] | elsewhere) & kNowhere);
      }
    }
    merged_places[w] = place == kNowhere ? places[first] : place;  // NaN
  }
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
  const auto finest = std::max_element(windows.begin(), windows.end(),
                                       [](const auto& a, const auto& b) { return a.windows() < b.windows(); });
  const int64_t before = std::accumulate(windows.begin(), finest, int64_t(0),
                                         [](int64_t sum, const auto& level) { return sum + level.windows(); });
  const size_t row = shape.width + kPyramidPadding;
  const Buffer<float> buffer((row + count) * threads);
  const Buffer<int32_t> rows(row * threads);
  std::fill_n(buffer.get(), (row + count) * threads, 0.0f);
  std::fill_n(rows.get(), row * threads, 0);
  parallel(threads, [&](const Team& team) {
    float* const values = buffer.get() + (row + count) * team.thread;
    const PyramidScratch own = {values + count, rows.get() + row * team.thread};
    for (int64_t i = team.begin(shape.planes); i < team.end(shape.planes); ++i) {
      const float* const plane = feats + i * pixels;
      int32_t* const placed = places ? places + i * count : nullptr;
      int32_t* const finest_placed = placed ? placed + before : nullptr;
      kernels().maxima(plane, int(shape.width), *finest, own, values + before, finest_placed);
      double total = levels.gamma * kernels().sum(plane, int(shape.height), int(shape.width)) / double(pixels);
      int64_t first = 0;
      for (auto level = windows.begin(); level != windows.end(); first += level++->windows()) {
        int32_t* const level_placed = placed ? placed + first : nullptr;
        if (level != finest && made_of(*level, *finest)) {
          merge(*finest, values + before, finest_placed, *level, values + first, level_placed);
        } else if (level != finest) {
          kernels().maxima(plane, int(shape.width), *level, own, values + first, level_placed);
        }
        total += std::accumulate(values + first, values + first + level->windows(), 0.0) / level->windows();
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
