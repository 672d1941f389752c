#include "common/simd_math.h"
#include "local_affinity_kernels.h"

extern "C" float sqrtf(float);

namespace wsss {
namespace WSSS_ISA {

constexpr int n = kLanes<float>;
using V = Vec<float>;
constexpr int kRowsTogether = WSSS_VECTOR_BYTES == 64 ? 2 : 1;  // as many as the registers hold the sums of

void inverse_norms(const AffinityProblem& problem, const float* feats, float* norms, int begin, int end) {
  const size_t plane = size_t(problem.height) * problem.width;
  for (size_t i = size_t(begin) * problem.width; i < size_t(end) * problem.width; i += n) {
    const size_t left = size_t(end) * problem.width - i;
    const int count = left < size_t(n) ? int(left) : n;
    V largest{}, sum{};
    for (int d = 0; d < problem.dim; ++d) {
      const V v = abs(load_some(feats + d * plane + i, count));
      largest = v > largest ? v : largest;
    }
    const V unit = largest > 0.0f ? 1.0f / largest : V{};  // so that no square overflows or vanishes
    for (int d = 0; d < problem.dim; ++d) {
      const V v = load_some(feats + d * plane + i, count) * unit;
      sum += v * v;
    }
    float lengths[n];
    store(lengths, sum);
    for (float& length : lengths) length = sqrtf(length);
    const V length = load(lengths);
    store_some(norms + i, length == 0.0f ? V{} : unit / length, count);
  }
}

// Channels [d, d + depth) of rows [first, last) of a tile's columns and margins, as lines [row][channel][kLine]; 0
// outside the map, and divided by the norms if there are any. Lines are written as far as a tile's vectors reach.
WSSS_ALWAYS_INLINE void pack(const AffinityProblem& problem, const AffinityTile& tile, const float* feats,
                             const float* norms, int d, int depth, int first, int last, float* packed) {
  const size_t plane = size_t(problem.height) * problem.width;
  const int left = tile.x_begin < kLineMargin ? tile.x_begin : kLineMargin;  // 0 or the whole margin
  const int end = tile.x_end + kLineMargin < problem.width ? tile.x_end + kLineMargin : problem.width;
  const int start = tile.x_begin - left, count = end - start;
  const int written = left + (tile.x_end - tile.x_begin + n - 1) / n * n + kLineMargin;
  for (int y = first; y < last; ++y) {
    const bool inside = y >= 0 && y < problem.height;
    const size_t at = inside ? size_t(y) * problem.width + start : 0;
    for (int i = 0; i < depth; ++i, packed += kLine) {
      float* const line = packed + kLineMargin - left;
      const float* const row = feats + size_t(d + i) * plane + at;
      for (int x = 0; x < kLineMargin - left; x += n) store(packed + x, V{});
      int x = 0;
      if (inside) {
        for (; x < count; x += n) {
          const V v = load_some(row + x, count - x);
          __builtin_prefetch(row + x + problem.width);  // the next row of this channel, after those of all others
          store(line + x, norms ? v * load_some(norms + at + x, count - x) : v);
        }
      }
      for (; x < written; x += n) store(line + x, V{});
    }
  }
}

// sum + v. Where there is a fused multiply-add it takes that: |a - b| keeps the adders busy, and the multipliers idle.
WSSS_ALWAYS_INLINE V add(V sum, V v, V one) {
#if defined(__FMA__)
  return sum + v * one;
#else
  (void)one;
  return sum + v;
#endif
}

// N neighbours side by side in one row, R rows of P vectors of pixels: sums over the channels in registers. The rows
// share the neighbours they load, most of which straddle two cache lines.
template <AffinityMetric metric, int R, int P, int N>
WSSS_ALWAYS_INLINE void accumulate(const float* here, size_t next_row, const float* there, int depth,
                                   float* const* sums, size_t stride) {
  const V one = in_register<float>(splat(1.0f));
  V sum[N * R * P] = {};
  for (int d = 0; d < depth; ++d, here += kLine, there += kLine) {
    V centre[R * P];
    unroll<0, R * P>([&](auto c) __attribute__((always_inline)) {
      centre[c] = in_register<float>(load(here + c / P * next_row + c % P * n));
    });
    unroll<0, N * P>([&](auto i) __attribute__((always_inline)) {
      const V other = in_register<float>(load(there + i / P + i % P * n));
      unroll<0, R>([&](auto r) __attribute__((always_inline)) {
        const V own = centre[r * P + i % P];
        V& to = sum[r * N * P + i];
        to = metric == AffinityMetric::kL1 ? add(to, abs(own - other), one) : to + own * other;
      });
    });
  }
  unroll<0, R * N * P>([&](auto i) __attribute__((always_inline)) {
    constexpr int in_row = i.value % (N * P);
    float* const at = sums[i.value / (N * P)] + in_row / P * stride + in_row % P * n;
    store(at, load(at) + sum[i]);
  });
}

template <AffinityMetric metric, int R, int N>
WSSS_ALWAYS_INLINE void accumulate_row(const float* here, size_t next_row, const float* there, int vectors, int depth,
                                       float* const* sums, size_t stride) {
  constexpr int P = WSSS_VECTOR_BYTES == 64 && R == 1 ? 2 : 1;
  float* at[R];
  for (int v = 0; v < vectors;) {
    const int taken = v + P <= vectors ? P : 1;
    for (int r = 0; r < R; ++r) at[r] = sums[r] + v * n;
    if (taken == P) {
      accumulate<metric, R, P, N>(here + v * n, next_row, there + v * n, depth, at, stride);
    } else {
      accumulate<metric, R, 1, N>(here + v * n, next_row, there + v * n, depth, at, stride);
    }
    v += taken;
  }
}

template <AffinityMetric metric, int R>
void accumulate_neighbours(const float* here, size_t next_row, const float* there, int neighbours, int vectors,
                           int depth, float* const* row_sums, size_t stride) {
  float* sums[R];
  for (int r = 0; r < R; ++r) sums[r] = row_sums[r];
  while (neighbours > 0) {
    const int taken = neighbours < 9 ? neighbours : 9;
    unroll<1, 10>([&](auto count) __attribute__((always_inline)) {
      if (count.value == taken) {
        accumulate_row<metric, R, count.value>(here, next_row, there, vectors, depth, sums, stride);
      }
    });
    neighbours -= taken;
    there += taken;
    for (float*& at : sums) at += taken * stride;
  }
}

// The dx of the offsets with this dy.
struct Reach {
  int first, last;
};
WSSS_ALWAYS_INLINE Reach reach_of(int radius, int dy) {
  if (dy < 0 || dy >= radius) return {0, -1};
  const int reach = stencil_reach(radius, dy);
  return {dy == 0 ? 1 : -reach, reach};
}

// Columns [first, last) of row y whose pair with offset (dy, dx) counts.
struct Columns {
  int first, last;
};
WSSS_ALWAYS_INLINE Columns paired_columns(const AffinityProblem& problem, int y, int dy, int dx, bool cropped) {
  const int margin = cropped ? problem.options.radius - 1 : 0;
  Columns columns{dx < 0 ? -dx : 0, problem.width - (dx > 0 ? dx : 0)};
  if (columns.first < margin) columns.first = margin;
  if (columns.last > problem.width - margin) columns.last = problem.width - margin;
  if (y + (dy > margin ? dy : margin) >= problem.height || columns.last < columns.first) columns.last = columns.first;
  return columns;
}

WSSS_ALWAYS_INLINE V inside(V v, int x, Columns columns) {
  static constexpr int32_t kLaneNumber[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  VecInt column;
  std::memcpy(&column, kLaneNumber, sizeof column);
  column += x;
  return (V)((VecInt)v & (column >= columns.first) & (column < columns.last));
}

WSSS_ALWAYS_INLINE void finish_tile(const AffinityProblem& problem, const AffinityTile& tile, float* out,
                                    double* row_sums, const float* sums, size_t stride) {
  const AffinityOptions& options = problem.options;
  const size_t plane = size_t(problem.height) * problem.width;
  const float mean = 1.0f / float(problem.dim);
  const float slope = float(-1.0 / (double(problem.dim) * options.scale));
  for (int y = tile.y_begin; y < tile.y_end; ++y) {
    Vec<double> row_sum{};
    for (int k = 0; k < problem.hood->count; ++k, sums += stride) {
      const Columns columns =
          paired_columns(problem, y, problem.hood->dy[k], problem.hood->dx[k], options.cropped && !options.automatic);
      float* const row = out + k * plane + size_t(y) * problem.width;
      for (int x = tile.x_begin; x < tile.x_end; x += n) {
        V v = load(sums + (x - tile.x_begin));
        if (options.automatic) {
          v = options.metric == AffinityMetric::kL1 ? v * mean : (v > 1.0f ? V{} : 1.0f - v);
        } else {
          v = options.metric == AffinityMetric::kL1 ? exp(v * slope) : (v < 0.0f ? V{} : v > 1.0f ? splat(1.0f) : v);
        }
        v = inside(v, x, columns);
        if (options.automatic) {
          const DoublePair distances = widen(v);
          row_sum += distances.low + distances.high;
        }
        store_some(row + x, v, tile.x_end - x);
      }
    }
    row_sums[y - tile.y_begin] = sum_of_lanes<double>(row_sum);
  }
}

template <AffinityMetric metric>
WSSS_ALWAYS_INLINE void forward_tile_of(const AffinityProblem& problem, const AffinityTile& tile, const float* feats,
                                        const float* norms, float* out, double* row_sums, float* packed, float* sums) {
  const int vectors = (tile.x_end - tile.x_begin + n - 1) / n, radius = problem.hood->radius;
  const size_t stride = size_t(vectors) * n, row_stride = stride * problem.hood->count;
  std::memset(sums, 0, row_stride * size_t(tile.y_end - tile.y_begin) * sizeof(float));
  const int last = tile.y_end + radius - 1 < problem.height ? tile.y_end + radius - 1 : problem.height;
  for (int d = 0; d < problem.dim; d += kForwardChannels) {
    const int depth = problem.dim - d < kForwardChannels ? problem.dim - d : kForwardChannels;
    pack(problem, tile, feats, norms, d, depth, tile.y_begin, last, packed);
    const size_t packed_row = size_t(depth) * kLine;
    for (int y = tile.y_begin; y < tile.y_end; y += kRowsTogether) {
      const bool two = kRowsTogether == 2 && y + 1 < tile.y_end;
      const float* const here = packed + size_t(y - tile.y_begin) * packed_row + kLineMargin;
      float* const row_sum = sums + size_t(y - tile.y_begin) * row_stride;
      for (int dy = 0; dy < radius + two && y + dy < last; ++dy) {
        const float* const there = here + dy * packed_row;
        const Reach upper = reach_of(radius, dy), lower = reach_of(radius, two ? dy - 1 : -1);
        const auto sums_of = [&](int row, int dx) {
          return row_sum + row * row_stride + size_t(offset_index(radius, dy - row, dx)) * stride;
        };
        const auto alone = [&](int row, Reach dx) {
          if (dx.first > dx.last) return;
          float* const at = sums_of(row, dx.first);
          accumulate_neighbours<metric, 1>(here + row * packed_row, 0, there + dx.first, dx.last - dx.first + 1,
                                           vectors, depth, &at, stride);
        };
        const Reach both{upper.first > lower.first ? upper.first : lower.first,
                         upper.last < lower.last ? upper.last : lower.last};
        if (both.first > both.last) {
          alone(0, upper);
          alone(1, lower);
          continue;
        }
        float* const at[2] = {sums_of(0, both.first), sums_of(1, both.first)};
        accumulate_neighbours<metric, 2>(here, packed_row, there + both.first, both.last - both.first + 1, vectors,
                                         depth, at, stride);
        alone(0, {upper.first, both.first - 1});
        alone(0, {both.last + 1, upper.last});
        alone(1, {lower.first, both.first - 1});
        alone(1, {both.last + 1, lower.last});
      }
    }
  }
  finish_tile(problem, tile, out, row_sums, sums, stride);
}

void forward_tile(const AffinityProblem& problem, const AffinityTile& tile, const float* feats, const float* norms,
                  float* out, double* row_sums, float* packed, float* sums) {
  if (problem.options.metric == AffinityMetric::kL1) {
    forward_tile_of<AffinityMetric::kL1>(problem, tile, feats, norms, out, row_sums, packed, sums);
  } else {
    forward_tile_of<AffinityMetric::kCosine>(problem, tile, feats, norms, out, row_sums, packed, sums);
  }
}

void apply_scale(const AffinityProblem& problem, float* out, float scale, int y) {
  const size_t plane = size_t(problem.height) * problem.width;
  for (int k = 0; k < problem.hood->count; ++k) {
    const Columns columns =
        paired_columns(problem, y, problem.hood->dy[k], problem.hood->dx[k], problem.options.cropped);
    float* const row = out + k * plane + size_t(y) * problem.width;
    for (int x = 0; x < problem.width; x += n) {
      const int count = problem.width - x;
      store_some(row + x, inside(exp(load_some(row + x, count) / -scale), x, columns), count);
    }
  }
}

void pair_weights(const AffinityProblem& problem, const float* grad, const float* affinity, float scale, float* pairs,
                  int y) {
  const AffinityOptions& options = problem.options;
  const size_t plane = size_t(problem.height) * problem.width, line = pair_line(problem.width);
  const float slope = options.metric == AffinityMetric::kL1 ? float(-1.0 / (double(problem.dim) * scale)) : 1 / scale;
  const bool exponential = options.metric == AffinityMetric::kL1 || options.automatic;
  for (int k = 0; k < problem.hood->count; ++k) {
    float* const row = pairs + k * pair_plane(problem) + size_t(y + problem.hood->radius - 1) * line;
    const size_t at = k * plane + size_t(y) * problem.width;
    std::memset(row, 0, line * sizeof(float));
    for (int x = 0; x < problem.width; x += n) {
      const int count = problem.width - x;
      const V g = load_some(grad + at + x, count), a = load_some(affinity + at + x, count);
      const V h = exponential ? g * a * slope : g;
      store_some(row + kLineMargin + x, a == 0.0f ? V{} : h, count);
    }
  }
}

WSSS_ALWAYS_INLINE V with_sign_of(V sign, V v) { return (V)((VecInt)v ^ ((VecInt)sign & int32_t(0x80000000))); }

// G channels of one vector of pixels: sum over the pairs in both directions.
template <AffinityMetric metric, int G>
WSSS_ALWAYS_INLINE void gather(const AffinityProblem& problem, const float* here, size_t packed_row, const float* pairs,
                               size_t line, float* const* out, int count) {
  V centre[G], sum[G];
  unroll<0, G>([&](auto g) __attribute__((always_inline)) {
    centre[g] = load(here + g * kLine);
    sum[g] = V{};
  });
  const size_t plane = pair_plane(problem);
  const Neighbourhood& hood = *problem.hood;
  for (int k = 0; k < hood.count; ++k, pairs += plane) {
    const ptrdiff_t shift = ptrdiff_t(hood.dy[k]) * ptrdiff_t(packed_row) + hood.dx[k];
    const V to = load(pairs), from = load(pairs - ptrdiff_t(hood.dy[k]) * ptrdiff_t(line) - hood.dx[k]);
    unroll<0, G>([&](auto g) __attribute__((always_inline)) {
      const V after = load(here + g * kLine + shift), before = load(here + g * kLine - shift);
      if constexpr (metric == AffinityMetric::kL1) {
        const V up = centre[g] - after, down = centre[g] - before;
        sum[g] += up != 0.0f ? with_sign_of(up, to) : V{};
        sum[g] += down != 0.0f ? with_sign_of(down, from) : V{};
      } else {
        sum[g] += to * after;
        sum[g] += from * before;
      }
    });
  }
  unroll<0, G>([&](auto g) __attribute__((always_inline)) { store_some(out[g], sum[g], count); });
}

// d/df of a function of f / |f| whose gradient there is in grad: what is along f goes, the rest shrinks by |f|.
WSSS_ALWAYS_INLINE void through_norm(const AffinityProblem& problem, const AffinityTile& tile, const float* feats,
                                     const float* norms, float* grad) {
  const size_t plane = size_t(problem.height) * problem.width;
  for (int y = tile.y_begin; y < tile.y_end; ++y) {
    for (int x = tile.x_begin; x < tile.x_end; x += n) {
      const int count = tile.x_end - x;
      const size_t at = size_t(y) * problem.width + x;
      const V norm = load_some(norms + at, count);
      V along{};
      for (int d = 0; d < problem.dim; ++d) {
        along += load_some(feats + d * plane + at, count) * norm * load_some(grad + d * plane + at, count);
      }
      for (int d = 0; d < problem.dim; ++d) {
        const V unit = load_some(feats + d * plane + at, count) * norm;
        store_some(grad + d * plane + at, (load_some(grad + d * plane + at, count) - unit * along) * norm, count);
      }
    }
  }
}

template <AffinityMetric metric>
WSSS_ALWAYS_INLINE void backward_tile_of(const AffinityProblem& problem, const AffinityTile& tile, const float* feats,
                                         const float* norms, const float* pairs, float* grad_feats, float* packed) {
  constexpr int G = WSSS_VECTOR_BYTES == 64 ? 8 : 4;
  static_assert(kBackwardChannels % G == 0);
  const int halo = problem.hood->radius - 1;
  const size_t plane = size_t(problem.height) * problem.width, line = pair_line(problem.width);
  const size_t packed_row = size_t(kBackwardChannels) * kLine;
  for (int d = 0; d < problem.dim; d += kBackwardChannels) {
    const int depth = problem.dim - d < kBackwardChannels ? problem.dim - d : kBackwardChannels;
    for (int y = tile.y_begin - halo; y < tile.y_end + halo; ++y) {
      pack(problem, tile, feats, norms, d, depth, y, y + 1, packed + size_t(y - tile.y_begin + halo) * packed_row);
    }
    for (int y = tile.y_begin; y < tile.y_end; ++y) {
      for (int x = tile.x_begin; x < tile.x_end; x += n) {
        const float* const here =
            packed + size_t(y - tile.y_begin + halo) * packed_row + kLineMargin + (x - tile.x_begin);
        const float* const pair = pairs + size_t(y + halo) * line + kLineMargin + x;
        float* const out = grad_feats + size_t(d) * plane + size_t(y) * problem.width + x;
        int g = 0;
        for (; g + G <= depth; g += G) {
          float* rows[G];
          for (int i = 0; i < G; ++i) rows[i] = out + size_t(g + i) * plane;
          gather<metric, G>(problem, here + g * kLine, packed_row, pair, line, rows, tile.x_end - x);
        }
        for (; g < depth; ++g) {
          float* row = out + size_t(g) * plane;
          gather<metric, 1>(problem, here + g * kLine, packed_row, pair, line, &row, tile.x_end - x);
        }
      }
    }
  }
  if constexpr (metric == AffinityMetric::kCosine) through_norm(problem, tile, feats, norms, grad_feats);
}

void backward_tile(const AffinityProblem& problem, const AffinityTile& tile, const float* feats, const float* norms,
                   const float* pairs, float* grad_feats, float* packed) {
  if (problem.options.metric == AffinityMetric::kL1) {
    backward_tile_of<AffinityMetric::kL1>(problem, tile, feats, norms, pairs, grad_feats, packed);
  } else {
    backward_tile_of<AffinityMetric::kCosine>(problem, tile, feats, norms, pairs, grad_feats, packed);
  }
}

extern const AffinityKernels affinity_kernels;
constexpr AffinityKernels affinity_kernels = {inverse_norms, forward_tile, apply_scale, pair_weights, backward_tile};

}  // namespace WSSS_ISA
}  // namespace wsss
