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

// One bit a lane.
WSSS_ALWAYS_INLINE unsigned lanes_set(VecInt mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX__)
  return unsigned(_mm256_movemask_ps((__m256)mask));
#elif defined(__x86_64__)
  return unsigned(_mm_movemask_ps((__m128)mask));
#else
  unsigned bits = 0;
  for (int i = 0; i < n; ++i) bits |= unsigned(mask[i] & 1) << i;
  return bits;
#endif
}

WSSS_ALWAYS_INLINE int first_of(float value, const float* window, int width, const PyramidLevel& level) {
  for (int y = 0; y < level.window_rows; ++y) {
    for (int x = 0; x < level.window_columns; x += n) {
      const int left = level.window_columns - x, count = left < n ? left : n;
      const V values = load_some(window + int64_t(y) * width + x, count);
      const unsigned found = lanes_set((VecInt)(values == value)) & (count == 32 ? ~0u : (1u << count) - 1);
      if (found) return y * width + x + __builtin_ctz(found);
    }
  }
  return 0;  // a window of NaN
}

double maxima(const float* plane, int width, const PyramidLevel& level, float* peaks, int32_t* places) {
  VecInt lane;
  for (int i = 0; i < n; ++i) lane[i] = i;
  const V lowest = splat(-__builtin_inff());
  double total = 0;
  for (int band = 0; band < level.rows; ++band) {
    const float* const rows = plane + int64_t(band) * level.window_rows * width;
    for (int x = 0; x < width; x += n) {
      const int count = width - x < n ? width - x : n;
      V peak = load_some(rows + x, count);
      for (int y = 1; y < level.window_rows; ++y) peak = larger(load_some(rows + int64_t(y) * width + x, count), peak);
      store(peaks + x, peak);
    }
    for (int column = 0; column < level.columns; ++column) {
      const float* const window = peaks + column * level.window_columns;
      V peak = lowest;
      for (int x = 0; x < level.window_columns; x += n) {
        peak = larger(lane < level.window_columns - x ? load(window + x) : lowest, peak);
      }
      const float value = largest(peak);
      total += value;
      if (places) {
        const int corner = (band * level.window_rows) * width + column * level.window_columns;
        *places++ = corner + first_of(value, plane + corner, width, level);
      }
    }
  }
  return total;
}

extern const PyramidKernels pyramid_kernels;
const PyramidKernels pyramid_kernels = {sum_plane, maxima};

}  // namespace WSSS_ISA
}  // namespace wsss
