#include "region_boxes.h"

#include <algorithm>
#include <cfloat>

#include "common/buffer.h"
#include "common/parallel.h"

namespace wsss {

namespace {

// Pixels a thread should have to look at: some tens of microseconds.
constexpr double kPixelsPerThread = 2e4;

// Pixels [left, right) of a row that are on, and the box of the region they belong to where they are its root.
struct Run {
  int left, right, parent, top, bottom, box_left, box_right;
};

int root_of(Run* runs, int i) {
  while (runs[i].parent != i) i = runs[i].parent = runs[runs[i].parent].parent;
  return i;
}

// The earlier root stays: the forest does not depend on the order of the unions.
void unite(Run* runs, int i, int j) {
  i = root_of(runs, i), j = root_of(runs, j);
  if (i == j) return;
  if (j < i) std::swap(i, j);
  runs[j].parent = i;
  runs[i].bottom = std::max(runs[i].bottom, runs[j].bottom);
  runs[i].box_left = std::min(runs[i].box_left, runs[j].box_left);
  runs[i].box_right = std::max(runs[i].box_right, runs[j].box_right);
}

float peak_of(const float* map, int pixels) {
  float peak = -FLT_MAX;
  for (int i = 0; i < pixels; ++i) peak = map[i] > peak && map[i] <= FLT_MAX ? map[i] : peak;  // NaN fails both
  return peak;
}

// All runs of the map, united where they touch, diagonally too. Roots come before the other runs of their region.
int find_regions(const float* map, int height, int width, float least, Run* runs) {
  int count = 0, above = 0, above_end = 0;  // the runs of the row above
  for (int y = 0; y < height; ++y, map += width) {
    const int first = count;
    for (int x = 0; x < width;) {
      if (!(map[x] > least)) {
        ++x;
        continue;
      }
      const int left = x;
      while (x < width && map[x] > least) ++x;
      runs[count] = {left, x, count, y, y + 1, left, x};
      while (above < above_end && runs[above].right < left) ++above;
      for (int i = above; i < above_end && runs[i].left <= x; ++i) unite(runs, i, count);
      ++count;
    }
    above = first, above_end = count;
  }
  return count;
}

// counts: [H + 1, W + 1] of zeros, left as zeros.
void paint(const Run* runs, int count, int height, int width, int* counts, uint8_t* out) {
  const int line = width + 1;
  for (int i = 0; i < count; ++i) {
    const Run& box = runs[i];
    if (box.parent != i) continue;
    counts[box.top * line + box.box_left] += 1;
    counts[box.top * line + box.box_right] -= 1;
    counts[box.bottom * line + box.box_left] -= 1;
    counts[box.bottom * line + box.box_right] += 1;
  }
  for (int y = 0; y <= height; ++y, counts += line) {
    int covers = 0;
    for (int x = 0; x < width && y < height; ++x) {
      covers += counts[x];
      out[int64_t(y) * width + x] = covers != 0;
    }
    // A row holds its changes from the row above until here.
    if (y < height) {
      for (int x = 0; x <= width; ++x) counts[line + x] += counts[x];
    }
    std::fill(counts, counts + line, 0);
  }
}

}  // namespace

void region_boxes_cpu(const float* maps, uint8_t* out, int64_t maps_count, int64_t height, int64_t width,
                      float threshold, int threads) {
  const int64_t plane = height * width;
  if (maps_count == 0 || plane == 0) return;
  threads = worthwhile_threads(usable_threads(threads), double(maps_count) * double(plane), kPixelsPerThread);
  const size_t most_runs = size_t(height) * ((width + 1) / 2), changes = size_t(height + 1) * (width + 1);
  const Buffer<Run> runs(most_runs * threads);
  const Buffer<int> counts(changes * threads);
  parallel(threads, [&](const Team& team) {
    Run* const own = runs.get() + most_runs * team.thread;
    int* const own_counts = counts.get() + changes * team.thread;
    std::fill(own_counts, own_counts + changes, 0);
    for (int64_t i = team.begin(maps_count); i < team.end(maps_count); ++i) {
      const float peak = peak_of(maps + i * plane, int(plane));
      if (!(peak > 0)) {
        std::fill(out + i * plane, out + (i + 1) * plane, uint8_t(0));
        continue;
      }
      const int found = find_regions(maps + i * plane, int(height), int(width), threshold * peak, own);
      paint(own, found, int(height), int(width), own_counts, out + i * plane);
    }
  });
}

}  // namespace wsss
