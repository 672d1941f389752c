#include "common/simd_math.h"
#include "hspp_kernels.h"

namespace wsss {
namespace WSSS_ISA {

constexpr int n = kLanes<float>;
using V = Vec<float>;
static_assert(n <= kPyramidPadding, "a window is read in whole vectors");

constexpr int kRowsInFloat = 16;  // then the sums move on to double

double sum_plane(const float* plane, int height, int width) {
  double total = 0;
  for (int y = 0; y < height; y += kRowsInFloat) {
    const int end = y + kRowsInFloat < height ? y + kRowsInFloat : height;
    const float* const last = plane + int64_t(end) * width;
    V sums[2] = {};
    const float* p = plane + int64_t(y) * width;
    for (; last - p >= 2 * n; p += 2 * n) sums[0] += load(p), sums[1] += load(p + n);
    for (; p < last; p += n) sums[0] += load_some(p, last - p < n ? int(last - p) : n);
    float lanes[n];
    store(lanes, sums[0] + sums[1]);
    for (int i = 0; i < n; ++i) total += lanes[i];
  }
  return total;
}

WSSS_ALWAYS_INLINE V larger(V a, V b) { return a > b ? a : b; }

template <int D, int... I>
WSSS_ALWAYS_INLINE V larger_across(V v, Indices<I...>) {
  return larger(v, __builtin_shufflevector(v, v, (I ^ D)...));
}
template <int D = n / 2>
WSSS_ALWAYS_INLINE float largest(V v) {
  if constexpr (D == 0) {
    return v[0];
  } else {
    return largest<D / 2>(larger_across<D>(v, typename MakeIndices<n>::type{}));
  }
}

WSSS_ALWAYS_INLINE VecInt smaller(VecInt a, VecInt b) { return a < b ? a : b; }

template <int D, int... I>
WSSS_ALWAYS_INLINE VecInt smaller_across(VecInt v, Indices<I...>) {
  return smaller(v, __builtin_shufflevector(v, v, (I ^ D)...));
}
template <int D = n / 2>
WSSS_ALWAYS_INLINE int smallest(VecInt v) {
  if constexpr (D == 0) {
    return v[0];
  } else {
    return smallest<D / 2>(smaller_across<D>(v, typename MakeIndices<n>::type{}));
  }
}

// Column by column first, with the place in the plane that the largest comes from, then across the columns of each
// window.
template <bool kPlaces>
void find_maxima(const float* plane, int width, const PyramidLevel& level, PyramidScratch scratch, float* values,
                 int32_t* places) {
  constexpr int kNowhere = 0x7fffffff;
  VecInt lane;
  for (int i = 0; i < n; ++i) lane[i] = i;
  const V lowest = splat(-__builtin_inff());
  for (int band = 0; band < level.rows; ++band) {
    const float* const rows = plane + int64_t(band) * level.window_rows * width;
    for (int x = 0; x < width; x += n) {
      const int count = width - x < n ? width - x : n;
      V peak = load_some(rows + x, count);
      VecInt from = lane + (band * level.window_rows * width + x);
      for (int y = 1; y < level.window_rows; ++y) {
        const V value = load_some(rows + int64_t(y) * width + x, count);
        if constexpr (kPlaces) from = value > peak ? lane + ((band * level.window_rows + y) * width + x) : from;
        peak = larger(value, peak);
      }
      store(scratch.peaks + x, peak);
      if constexpr (kPlaces) std::memcpy(scratch.places + x, &from, sizeof from);
    }
    for (int column = 0; column < level.columns; ++column) {
      const int first = column * level.window_columns;
      V peak = lowest;
      for (int x = 0; x < level.window_columns; x += n) {
        peak = larger(lane < level.window_columns - x ? load(scratch.peaks + first + x) : lowest, peak);
      }
      const float value = *values++ = largest(peak);
      if constexpr (kPlaces) {
        VecInt place = kNowhere - VecInt{};
        for (int x = 0; x < level.window_columns; x += n) {
          VecInt from;
          std::memcpy(&from, scratch.places + first + x, sizeof from);
          const VecInt here = (load(scratch.peaks + first + x) == value) & (lane < level.window_columns - x);
          place = smaller(here ? from : kNowhere - VecInt{}, place);
        }
        const int found = smallest(place);
        *places++ = found == kNowhere ? band * level.window_rows * width + first : found;  // a window of NaN
      }
    }
  }
}

void maxima(const float* plane, int width, const PyramidLevel& level, PyramidScratch scratch, float* values,
            int32_t* places) {
  (places ? find_maxima<true> : find_maxima<false>)(plane, width, level, scratch, values, places);
}

extern const PyramidKernels pyramid_kernels;
const PyramidKernels pyramid_kernels = {sum_plane, maxima};

}  // namespace WSSS_ISA
}  // namespace wsss
