#include "common/simd_math.h"
#include "soft_histogram_kernels.h"

namespace wsss {
namespace WSSS_ISA {

constexpr int n = kLanes<float>;
using V = Vec<float>;

// Sums in registers: kVectors x kPanel and kBlockVectors x kRows. Two thirds of the registers, the rest holds factors.
constexpr int kVectors = 3;
#if defined(__AVX512F__)
constexpr int kPanel = 8, kBlockVectors = 4, kRows = 6;
#else
constexpr int kPanel = 4, kBlockVectors = 3, kRows = 4;
#endif
constexpr int kTile = kVectors * n, kBlock = kBlockVectors * n;

WSSS_ALWAYS_INLINE int at_most(int a, int b) { return a < b ? a : b; }

void load_tile(const float* feats, ptrdiff_t stride, int rows, int pixels, float* tile, float* squares) {
  V sums[kVectors];
  unroll<0, kVectors>([&](auto v) __attribute__((always_inline)) { sums[v] = V{}; });
  for (int k = 0; k < rows; ++k) {
    unroll<0, kVectors>([&](auto v) __attribute__((always_inline)) {
      const int left = pixels - v * n;
      const V x = left > 0 ? load_some(feats + k * stride + v * n, left) : V{};
      sums[v] += x * x;
      store(tile + k * kTile + v * n, x);
    });
  }
  unroll<0, kVectors>([&](auto v)
                          __attribute__((always_inline)) { store(squares + v * n, load(squares + v * n) + sums[v]); });
}

template <int Vectors>
WSSS_ALWAYS_INLINE void multiply_panels(const float* panels, int count, const float* tile, int depth, float* out,
                                        bool first, const NextRows& next) {
  for (int i = 0; i < count; ++i) {
    for (int row = next.rows * i / count; row < next.rows * (i + 1) / count; ++row) {
      for (int byte = 0; byte < kTile * 4; byte += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(next.begin + row * next.stride) + byte, 0, 2);
      }
      __builtin_prefetch(next.begin + row * next.stride + kTile - 1, 0, 2);
    }
    V sums[kPanel][Vectors];
    unroll<0, kPanel>([&](auto m) __attribute__((always_inline)) {
      unroll<0, Vectors>([&](auto v) __attribute__((always_inline)) { sums[m][v] = V{}; });
    });
    const float* const panel = panels + ptrdiff_t(i) * depth * kPanel;
    for (int k = 0; k < depth; ++k) {
      V x[Vectors];
      unroll<0, Vectors>(
          [&](auto v) __attribute__((always_inline)) { x[v] = in_register<float>(load(tile + k * kTile + v * n)); });
      unroll<0, kPanel>([&](auto m) __attribute__((always_inline)) {
        const V factor = in_register<float>(splat(panel[k * kPanel + m]));
        unroll<0, Vectors>([&](auto v) __attribute__((always_inline)) { sums[m][v] += factor * x[v]; });
      });
    }
    float* const rows = out + ptrdiff_t(i) * kPanel * kTile;
    unroll<0, kPanel>([&](auto m) __attribute__((always_inline)) {
      unroll<0, Vectors>([&](auto v) __attribute__((always_inline)) {
        float* const place = rows + m * kTile + v * n;
        store(place, first ? sums[m][v] : load(place) + sums[m][v]);
      });
    });
  }
}

void multiply(const float* panels, int count, const float* tile, int depth, int vectors, float* out, bool first,
              const NextRows& next) {
  if (vectors == 1) return multiply_panels<1>(panels, count, tile, depth, out, first, next);
  if (vectors == 2) return multiply_panels<2>(panels, count, tile, depth, out, first, next);
  multiply_panels<3>(panels, count, tile, depth, out, first, next);
}

void softmax(const ScoreTile& tile, int pixels, int32_t* assignment, float* bins) {
  V weight[kVectors];
  for (int v = 0; v < tile.vectors; ++v) {
    const V norm = load(tile.inverse_norm + v * n);
    V best{};
    VecInt place{};
    for (int m = 0; m < tile.words; ++m) {
      float* const row = tile.scores + ptrdiff_t(m) * kTile + v * n;
      const V cosine = load(row) * norm;
      store(row, cosine);
      if (m == 0) {
        best = cosine;
        continue;
      }
      const VecInt larger = (cosine > best) | ((cosine != cosine) & (best == best));  // NaN above all, as in torch
      best = larger ? cosine : best;
      place = larger ? m - VecInt{} : place;
    }
    V total{};
    for (int m = 0; m < tile.words; ++m) {
      float* const row = tile.scores + ptrdiff_t(m) * kTile + v * n;
      const V part = exp((load(row) - best) * tile.temperature);
      store(row, part);
      total += part;
    }
    store(tile.log_sum + v * n, best * tile.temperature + log2(total) * 0.693147181f);
    float used[n];
    for (int i = 0; i < n; ++i) used[i] = v * n + i < pixels ? 1.0f : 0.0f;
    weight[v] = load(used) / total;
    std::memcpy(assignment + v * n, &place, sizeof place);
  }
  for (int m = 0; m < tile.words; ++m) {
    V sum{};
    for (int v = 0; v < tile.vectors; ++v) sum += load(tile.scores + ptrdiff_t(m) * kTile + v * n) * weight[v];
    float lanes[n], bin = 0;
    store(lanes, sum);
    for (int i = 0; i < n; ++i) bin += lanes[i];
    bins[m] = bin;
  }
}

void slope(const ScoreTile& tile, const float* grad, float* along) {
  for (int v = 0; v < tile.vectors; ++v) {
    const V norm = load(tile.inverse_norm + v * n), log_sum = load(tile.log_sum + v * n);
    V mean{};
    for (int m = 0; m < tile.words; ++m) {
      const V cosine = load(tile.scores + ptrdiff_t(m) * kTile + v * n) * norm;
      mean += exp(cosine * tile.temperature - log_sum) * grad[m];
    }
    V sum{};
    for (int m = 0; m < tile.words; ++m) {
      float* const row = tile.scores + ptrdiff_t(m) * kTile + v * n;
      const V cosine = load(row) * norm;
      const V share = exp(cosine * tile.temperature - log_sum);
      const V result = tile.temperature * share * (grad[m] - mean);
      sum += result * cosine;
      store(row, result);
    }
    store(along + v * n, sum);
  }
}

void transpose_scores(const ScoreTile& tile, int rows, int span, float* out) {
  for (int v = 0; v < tile.vectors; ++v) {
    const V norm = load(tile.inverse_norm + v * n);
    for (int m = 0; m < rows; m += n) {
      V square[n];
      for (int i = 0; i < n; ++i) square[i] = load(tile.scores + ptrdiff_t(m + i) * kTile + v * n) * norm;
      transpose<float>(square);
      float* const place = out + (ptrdiff_t(m / kBlock) * span + v * n) * kBlock + m % kBlock;
      for (int i = 0; i < n; ++i) store(place + i * kBlock, square[i]);
    }
  }
}

template <int Vectors>
WSSS_ALWAYS_INLINE void reduce_block(const float* feats, ptrdiff_t feats_stride, int rows, const float* factor,
                                     int factor_stride, int pixels, float* out, ptrdiff_t out_stride) {
  const float* row[kRows];  // what is missing is the last row again
  unroll<0, kRows>([&](auto r)
                       __attribute__((always_inline)) { row[r] = feats + at_most(r, rows - 1) * feats_stride; });
  V sums[kRows][Vectors];
  unroll<0, kRows>([&](auto r) __attribute__((always_inline)) {
    unroll<0, Vectors>([&](auto v) __attribute__((always_inline)) { sums[r][v] = V{}; });
  });
  for (int p = 0; p < pixels; ++p) {
    V x[Vectors];
    unroll<0, Vectors>([&](auto v) __attribute__((always_inline)) {
      x[v] = in_register<float>(load(factor + ptrdiff_t(p) * factor_stride + v * n));
    });
    unroll<0, kRows>([&](auto r) __attribute__((always_inline)) {
      const V value = in_register<float>(splat(row[r][p]));
      unroll<0, Vectors>([&](auto v) __attribute__((always_inline)) { sums[r][v] += value * x[v]; });
    });
  }
  unroll<0, kRows>([&](auto r) __attribute__((always_inline)) {
    if (r < rows) {
      unroll<0, Vectors>([&](auto v) __attribute__((always_inline)) {
        float* const place = out + r * out_stride + v * n;
        store(place, load(place) + sums[r][v]);
      });
    }
  });
}

void reduce(const float* feats, ptrdiff_t feats_stride, int rows, const float* factor, int factor_stride, int vectors,
            int pixels, float* out, ptrdiff_t out_stride) {
  switch (vectors) {
    case 1: return reduce_block<1>(feats, feats_stride, rows, factor, factor_stride, pixels, out, out_stride);
    case 2: return reduce_block<2>(feats, feats_stride, rows, factor, factor_stride, pixels, out, out_stride);
    case 3: return reduce_block<3>(feats, feats_stride, rows, factor, factor_stride, pixels, out, out_stride);
    default:
      return reduce_block<kBlockVectors>(feats, feats_stride, rows, factor, factor_stride, pixels, out, out_stride);
  }
}

void settle(const float* products, const float* feats, float* grad, ptrdiff_t stride, int rows, int pixels,
            const float* scale, const float* pull) {
  for (int k = 0; k < rows; ++k) {
    for (int p = 0; p < pixels; p += n) {
      const V x = load_some(feats + k * stride + p, pixels - p);
      store_some(grad + k * stride + p, load(products + k * kTile + p) * load(scale + p) - x * load(pull + p),
                 pixels - p);
    }
  }
}

extern const HistogramKernels histogram_kernels;
const HistogramKernels histogram_kernels = {n,        kTile,   kPanel, kBlock,           kRows,  load_tile,
                                            multiply, softmax, slope,  transpose_scores, reduce, settle};

}  // namespace WSSS_ISA
}  // namespace wsss
