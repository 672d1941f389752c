#include "common/simd_math.h"
#include "hspp_kernels.h"

namespace wsss {
namespace WSSS_ISA {

constexpr int n = kLanes<float>;
using V = Vec<float>;
static_assert(n <= kPyramidPadding, "rows are read and written in whole vectors");
static_assert(kPyramidPlanes % n == 0, "planes side by side are whole vectors");

constexpr int kRowsInFloat = 16;  // then the sums move on to double

double sum_plane(const float* plane, int height, int width) {
  DoublePair total = {};
  for (int y = 0; y < height; y += kRowsInFloat) {
    const int end = y + kRowsInFloat < height ? y + kRowsInFloat : height;
    const float* const last = plane + int64_t(end) * width;
    V sums[2] = {};
    const float* p = plane + int64_t(y) * width;
    for (; last - p >= 2 * n; p += 2 * n) sums[0] += load(p), sums[1] += load(p + n);
    for (; p < last; p += n) sums[0] += load_some(p, last - p < n ? int(last - p) : n);
    const DoublePair wide = widen(sums[0] + sums[1]);
    total.low += wide.low, total.high += wide.high;
  }
  return sum_of_lanes<double>(total.low + total.high);
}

template <bool kPlaces>
struct Peaks {
  V values;
  VecInt places;

  static Peaks at(PyramidMaxima maxima, int64_t i) {
    Peaks peaks = {in_register<float>(load(maxima.values + i)), {}};
    if constexpr (kPlaces) peaks.places = in_register<int32_t>(load(maxima.places + i));
    return peaks;
  }
  void put(PyramidMaxima maxima, int64_t i) const {
    store(maxima.values + i, values);
    if constexpr (kPlaces) store(maxima.places + i, places);
  }
};

// The larger of each two; of equal ones the one that comes first in the plane.
template <bool kPlaces>
WSSS_ALWAYS_INLINE Peaks<kPlaces> larger(const Peaks<kPlaces>& a, const Peaks<kPlaces>& b) {
  const VecInt second = (b.values > a.values) | ((b.values == a.values) & (b.places < a.places));
  return {b.values > a.values ? b.values : a.values, second ? b.places : a.places};
}

// Of columns side by side, `count` of them in the plane.
template <bool kPlaces, bool kWhole>
WSSS_ALWAYS_INLINE Peaks<kPlaces> down_columns(const float* p, int count, int rows, int width, VecInt place) {
  Peaks<kPlaces> peaks = {splat(-__builtin_inff()), place};
  for (int y = 0; y < rows; ++y, p += width, place += width) {
    const V value = kWhole ? load(p) : load_some(p, count);
    const V highest = value > peaks.values ? value : peaks.values;
    if constexpr (kPlaces) peaks.places = highest != peaks.values ? place : peaks.places;  // off the chain of maxima
    peaks.values = highest;
  }
  return peaks;
}

// Column by column first, with the place in the plane that the largest comes from. Then across: after each step a value
// stands for twice as many columns, its own and those to the right of it, all bands in one row. What reaches into the
// next band or behind the last is never looked at.
template <bool kPlaces>
void find_maxima(const float* plane, int width, const PyramidLevel& level, PyramidMaxima scratch,
                 PyramidMaxima maxima) {
  const int rows = level.window_rows;
  const int64_t length = int64_t(level.rows) * width, end = length * rows;
  VecInt lane;
  for (int i = 0; i < n; ++i) lane[i] = i;
  for (int band = 0; band < level.rows; ++band) {
    for (int64_t x = 0; x < width; x += n) {
      const int place = int(band * rows * int64_t(width) + x);
      const bool whole = place + int64_t(rows - 1) * width + n <= end;  // else what is behind the plane would be read
      const Peaks<kPlaces> peaks =
          whole ? down_columns<kPlaces, true>(plane + place, n, rows, width, lane + place)
                : down_columns<kPlaces, false>(plane + place, int(width - x), rows, width, lane + place);
      peaks.put(scratch, int64_t(band) * width + x);
    }
  }
  for (int covered = 1, step; covered < level.window_columns; covered += step) {
    step = covered < level.window_columns - covered ? covered : level.window_columns - covered;
    for (int64_t x = 0; x < length - step; x += n) {
      larger(Peaks<kPlaces>::at(scratch, x), Peaks<kPlaces>::at(scratch, x + step)).put(scratch, x);
    }
  }
  int64_t window = 0;
  for (int band = 0; band < level.rows; ++band) {
    for (int column = 0; column < level.columns; ++column, window += kPyramidPlanes) {
      const int first = band * width + column * level.window_columns;
      maxima.values[window] = scratch.values[first];
      if constexpr (kPlaces) maxima.places[window] = scratch.places[first];
    }
  }
}

template <bool kPlaces>
void merge_maxima(const PyramidLevel& fine, PyramidMaxima found, const PyramidLevel& coarse, PyramidMaxima merged) {
  const int down = coarse.window_rows / fine.window_rows, across = coarse.window_columns / fine.window_columns;
  for (int w = 0; w < coarse.windows(); ++w) {
    const int64_t first = int64_t(w / coarse.columns) * down * fine.columns + w % coarse.columns * across;
    for (int p = 0; p < kPyramidPlanes; p += n) {
      Peaks<kPlaces> peaks = Peaks<kPlaces>::at(found, first * kPyramidPlanes + p);
      for (int y = 0; y < down; ++y) {
        for (int x = 0; x < across; ++x) {
          const int64_t window = first + int64_t(y) * fine.columns + x;
          peaks = larger(peaks, Peaks<kPlaces>::at(found, window * kPyramidPlanes + p));
        }
      }
      peaks.put(merged, int64_t(w) * kPyramidPlanes + p);
    }
  }
}

void find(const float* plane, int width, const PyramidLevel& level, PyramidMaxima scratch, PyramidMaxima maxima) {
  (maxima.places ? find_maxima<true> : find_maxima<false>)(plane, width, level, scratch, maxima);
}

void merge(const PyramidLevel& fine, PyramidMaxima found, const PyramidLevel& coarse, PyramidMaxima merged) {
  (found.places ? merge_maxima<true> : merge_maxima<false>)(fine, found, coarse, merged);
}

void add_means(const float* values, int windows, double* totals) {
  for (int p = 0; p < kPyramidPlanes; p += n) {
    DoublePair sums = {};
    for (int w = 0; w < windows; ++w) {
      const DoublePair wide = widen(load(values + int64_t(w) * kPyramidPlanes + p));
      sums.low += wide.low, sums.high += wide.high;
    }
    double* const low = totals + p;
    double* const high = low + n / 2;
    store(low, load(low) + sums.low / double(windows));
    store(high, load(high) + sums.high / double(windows));
  }
}

extern const PyramidKernels pyramid_kernels;
const PyramidKernels pyramid_kernels = {sum_plane, find, merge, add_means};

}  // namespace WSSS_ISA
}  // namespace wsss
