#include "common/simd.h"
#include "kmeans_kernels.h"

namespace wsss {
namespace WSSS_ISA {

constexpr int n = kLanes<float>;
using V = Vec<float>;
static_assert(kPadding % n == 0 && kDepth % kPadding == 0);

void block_sums(const float* x, int64_t rows, int64_t stride, int64_t count, float* sums, double* squares) {
  for (int64_t i = 0; i < rows; ++i, x += stride) {
    Vec<double> square{};
    for (int64_t d = 0; d < count; d += n) {
      const int left = count - d < n ? int(count - d) : n;
      const V v = load_some(x + d, left);
      store_some(sums + d, i == 0 ? v : load_some(sums + d, left) + v, left);
      const DoublePair squared = widen(v * v);
      square += squared.low + squared.high;
    }
    squares[i] = sum_of_lanes(square);
  }
}

double centre_row(const float* from, const float* mean, float* to, int64_t count) {
  Vec<double> square{};
  for (int64_t d = 0; d < count; d += n) {
    const int left = count - d < n ? int(count - d) : n;
    const V v = load_some(from + d, left) - load_some(mean + d, left);
    store(to + d, v);
    const DoublePair squares = widen(v * v);
    square += squares.low + squares.high;
  }
  for (int64_t d = (count + n - 1) / n * n; d % kPadding != 0; d += n) store(to + d, V{});
  return sum_of_lanes(square);
}

template <int R, int C>
WSSS_ALWAYS_INLINE void tile(const float* const* rows, const float* const* others, int64_t begin, int64_t end,
                             float* partial, int64_t row_stride) {
  V sum[R * C];
  unroll<0, R>([&](auto i) __attribute__((always_inline)) {
    unroll<0, C>([&](auto j) __attribute__((always_inline)) {
      sum[i * C + j] = begin == 0 ? V{} : load(partial + i * row_stride + j * n);
    });
  });
  for (int64_t d = begin; d < end; d += n) {
    V other[C];
    unroll<0, C>([&](auto j) __attribute__((always_inline)) { other[j] = load(others[j] + d); });
    unroll<0, R>([&](auto i) __attribute__((always_inline)) {
      const V value = load(rows[i] + d);
      unroll<0, C>([&](auto j) __attribute__((always_inline)) { sum[i * C + j] += value * other[j]; });
    });
  }
  unroll<0, R>([&](auto i) __attribute__((always_inline)) {
    unroll<0, C>([&](auto j)
                     __attribute__((always_inline)) { store(partial + i * row_stride + j * n, sum[i * C + j]); });
  });
}

template <int R>
WSSS_ALWAYS_INLINE void tiles(const float* const* rows, const float* const* others, int64_t vectors, int64_t begin,
                              int64_t end, float* partial) {
  constexpr int C = WSSS_VECTOR_BYTES == 64 ? 3 : 2;
  const int64_t stride = vectors * n;
  int64_t j = 0;
  for (; j + C <= vectors; j += C) tile<R, C>(rows, others + j, begin, end, partial + j * n, stride);
  for (; j < vectors; ++j) tile<R, 1>(rows, others + j, begin, end, partial + j * n, stride);
}

void products(const float* const* rows, int count, const float* const* others, int64_t vectors, int64_t depth,
              float* out, float* partial) {
  constexpr int R = WSSS_VECTOR_BYTES == 64 ? 8 : 4;
  static_assert(kRowsAtOnce % R == 0);
  for (int64_t begin = 0; begin < depth; begin += kDepth) {
    const int64_t end = begin + kDepth < depth ? begin + kDepth : depth;
    int i = 0;
    for (; i + R <= count; i += R) tiles<R>(rows + i, others, vectors, begin, end, partial + i * vectors * n);
    for (; i < count; ++i) tiles<1>(rows + i, others, vectors, begin, end, partial + i * vectors * n);
  }
  for (int64_t i = 0; i < count * vectors; ++i) {
    const V v = load(partial + i * n);
    float sum = 0;
    for (int j = 0; j < n; ++j) sum += v[j];
    out[i] = sum;
  }
}

void add_row(const float* x, double sign, int64_t count, double* sums) {
  constexpr int half = kLanes<double>;
  for (int64_t d = 0; d < count; d += n) {
    const DoublePair v = widen(load(x + d));
    store(sums + d, load(sums + d) + sign * v.low);
    store(sums + d + half, load(sums + d + half) + sign * v.high);
  }
}

double move_center(const double* sums, double rows, int64_t count, const float* before, float* center) {
  double square = 0;
  const double weight = 1 / rows;
  for (int64_t d = 0; d < count; ++d) {
    center[d] = float(sums[d] * weight);
    const double move = double(center[d]) - double(before[d]);
    square += move * move;
  }
  return square;
}

double spread(const double* sums, double rows, int64_t count, const float* center) {
  double sum = 0;
  for (int64_t d = 0; d < count; ++d) sum += (rows * double(center[d]) - 2 * sums[d]) * double(center[d]);
  return sum;
}

double square_distance(const float* a, const float* b, int64_t count) {
  Vec<double> sum{};
  for (int64_t d = 0; d < count; d += n) {
    const V move = load(a + d) - load(b + d);
    const DoublePair squares = widen(move * move);
    sum += squares.low + squares.high;
  }
  return sum_of_lanes(sum);
}

extern const KMeansKernels kmeans_kernels;
constexpr KMeansKernels kmeans_kernels = {block_sums,  centre_row, products,       add_row,
                                          move_center, spread,     square_distance};

}  // namespace WSSS_ISA
}  // namespace wsss
