#include "common/simd.h"
#include "common/simd_math.h"
#include "pixel_adaptive_kernels.h"

namespace wsss {
namespace WSSS_ISA {
namespace {

constexpr int n = kLanes<float>;
constexpr int kGroup = n == 16 ? 8 : 6;  // maps whose sums stay in registers
typedef uint16_t Half __attribute__((vector_size(WSSS_VECTOR_BYTES / 2)));
typedef uint32_t VecUint __attribute__((vector_size(WSSS_VECTOR_BYTES)));

// A weight w is kept as 2^16 sqrt(w / 1.02) in whole numbers: whatever the weights of a pixel, what rounding does to a
// sum of values in 0..1 has a deviation below 1e-5, a fifth of what it is with float16. `factors` undoes the scale.
WSSS_ALWAYS_INLINE void store_weight(uint16_t* to, Vec<float> weight) {
  const VecInt root = __builtin_convertvector(square_root(weight * (65536.0f * 65536.0f / 1.02f)) + 0.5f, VecInt);
  const Half half = __builtin_convertvector((VecUint)root, Half);
  std::memcpy(to, &half, sizeof half);
}

WSSS_ALWAYS_INLINE Vec<float> load_weight(const uint16_t* from) {
  Half half;
  std::memcpy(&half, from, sizeof half);
  const Vec<float> root = __builtin_convertvector(__builtin_convertvector(half, VecInt), Vec<float>);
  return root * root;
}

// Standard deviation (unbiased) of the neighbours' differences to the centre, PAMR's with a 0 for each ring.
WSSS_ALWAYS_INLINE Vec<float> deviation(const WeightRow& row, int channel, int x, Vec<float> centre) {
  const float* const* const taps = row.taps + channel * row.neighbours;
  const int zeros = row.position ? 0 : row.neighbours / 8, count = row.neighbours + zeros;
  Vec<float> sum{};
  for (int k = 0; k < row.neighbours; ++k) sum += load(taps[k] + x) - centre;
  const Vec<float> mean = sum * (1.0f / float(count));
  Vec<float> squares = mean * mean * float(zeros);
  for (int k = 0; k < row.neighbours; ++k) {
    const Vec<float> off = load(taps[k] + x) - centre - mean;
    squares += off * off;
  }
  return square_root(squares * (1.0f / float(count - 1)));
}

WSSS_ALWAYS_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return a > b ? a : b; }

void weigh(const WeightRow& row) {
  Vec<float> weights[kMaxTaps];
  for (int block = 0; block < row.blocks; ++block) {
    const int x = block * n;
    Vec<float> centre[3], scale[3];
    for (int c = 0; c < 3; ++c) {
      centre[c] = load(row.centre[c] + x);
      const Vec<float> sd = deviation(row, c, x, centre[c]);
      scale[c] = row.position ? 1.0f / (sd + 1e-8f) / 0.3f : 1.0f / (1e-8f + 0.1f * sd);
    }
    Vec<float> largest = splat(-3.4e38f);
    for (int k = 0; k < row.neighbours; ++k) {
      Vec<float> distance{};
      for (int c = 0; c < 3; ++c) {
        const Vec<float> off = abs(load(row.taps[c * row.neighbours + k] + x) - centre[c]) * scale[c];
        distance += row.position ? off * off : off;
      }
      weights[k] = distance * (-1.0f / 3);
      largest = larger(weights[k], largest);
    }
    Vec<float> total{};
    for (int k = 0; k < row.neighbours; ++k) {
      weights[k] = exp(weights[k] - largest);
      total += weights[k];
    }
    const Vec<float> inverse = 1.0f / total;
    uint16_t* const out = row.weights + ptrdiff_t(block) * row.neighbours * n;
    Vec<float> sum{}, kept{};
    for (int k = 0; k < row.neighbours; ++k) {
      Vec<float> weight = weights[k] * inverse;
      if (row.position) weight += row.position[k];
      store_weight(out + k * n, weight);
      sum += weight;
      kept += load_weight(out + k * n);
    }
    store(row.factors + x, sum / kept);  // NaN where the picture is
  }
}

// kMaps maps from `first` on; with few of them in two halves, as an addition takes several cycles. Maps outside, blocks
// inside: the neighbours of some maps fit the first-level cache, those of all do not.
template <int kMaps>
void smooth_maps(const SmoothRow& row, int first) {
  constexpr int kChains = kMaps <= 3 ? 2 : 1;
  for (int block = 0; block < row.blocks; ++block) {
    const int x = block * n;
    const uint16_t* const weights = row.weights + ptrdiff_t(block) * row.neighbours * n;
    const ptrdiff_t from = first * row.map_stride + x;
    Vec<float> sum[kChains][kMaps] = {};
    for (int k = 0; k < row.neighbours; k += kChains) {
      unroll<0, kChains>([&](auto chain) __attribute__((always_inline)) {
        const Vec<float> weight = in_register<float>(load_weight(weights + (k + chain) * n));
        const float* const tap = row.taps[k + chain] + from;
        unroll<0, kMaps>(
            [&](auto m) __attribute__((always_inline)) { sum[chain][m] += weight * load(tap + m * row.map_stride); });
      });
    }
    const Vec<float> factor = load(row.factors + x);
    unroll<0, kMaps>([&](auto m) __attribute__((always_inline)) {
      Vec<float> value = sum[0][m];
      if constexpr (kChains == 2) value += sum[1][m];
      store_some(row.out + (first + m) * row.out_stride + x, value * factor, row.pixels - x);
    });
  }
}

void smooth(const SmoothRow& row) {
  const int groups = (row.maps + kGroup - 1) / kGroup;
  for (int group = 0; group < groups; ++group) {
    const int first = row.maps * group / groups, maps = row.maps * (group + 1) / groups - first;
    unroll<1, kGroup + 1>([&](auto m) {
      if (maps == m) smooth_maps<m>(row, first);
    });
  }
}

void spread(const SpreadRow& row) {
  for (int block = 0; block < row.blocks; ++block) {
    const int x = block * n;
    const uint16_t* const from = row.weights + ptrdiff_t(block) * row.neighbours * n;
    const Vec<float> factor = load(row.factors + x);
    for (int first = 0; first < row.maps; first += kGroup) {
      const int maps = row.maps - first < kGroup ? row.maps - first : kGroup;
      Vec<float> grad[kGroup];
      for (int m = 0; m < maps; ++m) {
        const Vec<float> value = load_some(row.grad + (first + m) * row.grad_stride + x, row.pixels - x);
        grad[m] = value == 0.0f ? Vec<float>{} : value * factor;  // past the width too, where the factor is anything
      }
      for (int k = 0; k < row.neighbours; ++k) {
        const Vec<float> weight = load_weight(from + k * n);
        float* const to = row.taps[k] + first * row.map_stride + x;
        for (int m = 0; m < maps; ++m) {
          store(to + m * row.map_stride, load(to + m * row.map_stride) + weight * grad[m]);
        }
      }
    }
  }
}

}  // namespace

extern const AdaptiveKernels adaptive_kernels;
const AdaptiveKernels adaptive_kernels = {n, &weigh, &smooth, &spread};

}  // namespace WSSS_ISA
}  // namespace wsss
