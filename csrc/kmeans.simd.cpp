#include "common/simd.h"
#include "kmeans_kernels.h"

namespace wsss {
namespace WSSS_ISA {

constexpr int n = kLanes<float>;
using V = Vec<float>;
static_assert(kPadding % n == 0 && kDepth % kPadding == 0);

template <int R>
WSSS_ALWAYS_INLINE void add_rows(const float* x, int64_t stride, int64_t count, bool first, float* sums,
                                 double* squares) {
  Vec<double> square[R] = {};
  for (int64_t d = 0; d < count; d += n) {
    const int left = count - d < n ? int(count - d) : n;
    V sum = first ? V{} : load_some(sums + d, left);
    unroll<0, R>([&](auto i) __attribute__((always_inline)) {
      const V v = load_some(x + i * stride + d, left);
      sum += v;
      const DoublePair squared = widen(v * v);
      square[i] += squared.low + squared.high;
    });
    store_some(sums + d, sum, left);
  }
  unroll<0, R>([&](auto i) __attribute__((always_inline)) { squares[i] = sum_of_lanes<double>(square[i]); });
}

void block_sums(const float* x, int64_t rows, int64_t stride, int64_t count, float* sums, double* squares) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) add_rows<4>(x + i * stride, stride, count, i == 0, sums, squares + i);
  for (; i < rows; ++i) add_rows<1>(x + i * stride, stride, count, i == 0, sums, squares + i);
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
  return sum_of_lanes<double>(square);
}

// packed, partial: of the tile's first vector, of `vectors` in all.
template <int R, int C>
WSSS_ALWAYS_INLINE void tile(const float* const* rows, const float* const* next, const float* packed, int64_t vectors,
                             int64_t begin, int64_t end, float* partial) {
  const int64_t stride = vectors * n;
  V sum[R * C];
  unroll<0, R>([&](auto i) __attribute__((always_inline)) {
    unroll<0, C>([&](auto j) __attribute__((always_inline)) {
      sum[i * C + j] = begin == 0 ? V{} : load(partial + i * stride + j * n);
    });
  });
  for (int64_t d = begin; d < end; d += kPadding) {
    unroll<0, R>([&](auto i) __attribute__((always_inline)) { fetch(next[i] + d); });
    unroll<0, kPadding / n>([&](auto part) __attribute__((always_inline)) {
      V value[R];
      unroll<0, R>([&](auto i)
                       __attribute__((always_inline)) { value[i] = in_register<float>(load(rows[i] + d + part * n)); });
      unroll<0, C>([&](auto j) __attribute__((always_inline)) {
        const V other = in_register<float>(load(packed + d * vectors + j * kPadding + part * n));
        unroll<0, R>([&](auto i) __attribute__((always_inline)) { sum[i * C + j] += value[i] * other; });
      });
    });
  }
  unroll<0, R>([&](auto i) __attribute__((always_inline)) {
    unroll<0, C>([&](auto j) __attribute__((always_inline)) { store(partial + i * stride + j * n, sum[i * C + j]); });
  });
}

template <int R>
void tiles(const float* const* rows, const float* const* next, const float* packed, int64_t vectors, int64_t begin,
           int64_t end, float* partial) {
  constexpr int C = WSSS_VECTOR_BYTES == 64 ? 5 : 6;
  int64_t j = 0;
  for (; j + C <= vectors; j += C) tile<R, C>(rows, next, packed + j * kPadding, vectors, begin, end, partial + j * n);
  unroll<1, C>([&](auto left) __attribute__((always_inline)) {
    if (left == vectors - j) tile<R, left>(rows, next, packed + j * kPadding, vectors, begin, end, partial + j * n);
  });
}

void products(const float* const* rows, const float* const* next, int count, const float* packed, int64_t vectors,
              int64_t depth, float* out, float* partial) {
  constexpr int R = WSSS_VECTOR_BYTES == 64 ? 4 : 2;
  for (int i = 0; i < count; ++i) open_pages(next[i], depth);
  for (int64_t begin = 0; begin < depth; begin += kDepth) {
    const int64_t end = begin + kDepth < depth ? begin + kDepth : depth;
    int i = 0;
    for (; i + R <= count; i += R) tiles<R>(rows + i, next + i, packed, vectors, begin, end, partial + i * vectors * n);
    for (; i < count; ++i) tiles<1>(rows + i, next + i, packed, vectors, begin, end, partial + i * vectors * n);
  }
  for (int64_t i = 0; i < count * vectors; ++i) out[i] = sum_of_lanes<float>(load(partial + i * n));
}

void move_row(const float* x, const float* next, int64_t count, double* from, double* to) {
  constexpr int half = kLanes<double>;
  for (int64_t d = 0; d < count; d += n) {
    fetch(next + d);
    const DoublePair v = widen(load(x + d));
    if (from) {
      store(from + d, load(from + d) - v.low);
      store(from + d + half, load(from + d + half) - v.high);
    }
    if (to) {
      store(to + d, load(to + d) + v.low);
      store(to + d + half, load(to + d + half) + v.high);
    }
  }
}

double move_center(const double* sums, double rows, int64_t count, const float* before, float* center) {
  constexpr int half = kLanes<double>;
  typedef float Half __attribute__((vector_size(WSSS_VECTOR_BYTES / 2)));
  const Vec<double> weight = splat(1 / rows);
  Vec<double> square{};
  for (int64_t d = 0; d < count; d += half) {
    const Half value = __builtin_convertvector(load(sums + d) * weight, Half);
    std::memcpy(center + d, &value, sizeof value);
    Half old;
    std::memcpy(&old, before + d, sizeof old);
    const Vec<double> move = __builtin_convertvector(value, Vec<double>) - __builtin_convertvector(old, Vec<double>);
    square += move * move;
  }
  return sum_of_lanes<double>(square);
}

double spread(const double* sums, double rows, int64_t count, const float* center) {
  constexpr int half = kLanes<double>;
  Vec<double> sum{};
  for (int64_t d = 0; d < count; d += n) {
    const DoublePair v = widen(load(center + d));
    sum += (splat(rows) * v.low - 2 * load(sums + d)) * v.low;
    sum += (splat(rows) * v.high - 2 * load(sums + d + half)) * v.high;
  }
  return sum_of_lanes<double>(sum);
}

double square(const float* a, int64_t count) {
  Vec<double> sum{};
  for (int64_t d = 0; d < count; d += n) {
    const V v = load(a + d);
    const DoublePair squares = widen(v * v);
    sum += squares.low + squares.high;
  }
  return sum_of_lanes<double>(sum);
}

double square_distance(const float* a, const float* b, int64_t count) {
  Vec<double> sum{};
  for (int64_t d = 0; d < count; d += n) {
    const V move = load(a + d) - load(b + d);
    const DoublePair squares = widen(move * move);
    sum += squares.low + squares.high;
  }
  return sum_of_lanes<double>(sum);
}

extern const KMeansKernels kmeans_kernels;
constexpr KMeansKernels kmeans_kernels = {block_sums,  centre_row, products, open_pages<float>, move_row,
                                          move_center, spread,     square,   square_distance};

}  // namespace WSSS_ISA
}  // namespace wsss
