#include "cross_image_attention.h"

#include "common/simd.h"
#include "common/simd_math.h"
#include "cross_image_attention_kernels.h"

namespace wsss {
namespace WSSS_ISA {
namespace {

constexpr int n = kLanes<float>;
constexpr int kRows = 6, kVectors = n == 16 ? 4 : 2;  // sums in registers: 24 of 32, or 12 of 16
constexpr int kPanel = kVectors * n;
constexpr float kLeast = 1e-5f;  // inside the entropy's logarithm
constexpr float kInfinity = __builtin_inff();

void pack(const float* from, ptrdiff_t row, const int32_t* index, int steps, int columns, float* to) {
  for (int first = 0; first < columns; first += kPanel) {
    for (int k = 0; k < steps; ++k, to += kPanel) {
      const float* const source = from + row * (index ? index[k] : k) + first;
      for (int j = 0; j < kPanel; j += n) {
        const int left = columns - first - j;
        store(to + j, left > 0 ? load_some(source + j, left) : Vec<float>{});
      }
    }
  }
}

void pack_rows(const float* from, ptrdiff_t row, const int32_t* index, int steps, int columns, float* to) {
  for (int first = 0; first < columns; first += kPanel, to += ptrdiff_t(steps) * kPanel) {
    for (int j = 0; j < kPanel; j += n) {
      const float* source[n];
      int there = columns - first - j;
      there = there < 0 ? 0 : there < n ? there : n;
      for (int i = 0; i < there; ++i) source[i] = from + row * (index ? index[first + j + i] : first + j + i);
      for (int k = 0; k < steps; k += n) {
        Vec<float> block[n];
        for (int i = 0; i < n; ++i) block[i] = i < there ? load_some(source[i] + k, steps - k) : Vec<float>{};
        transpose<float>(block);
        for (int i = 0; i < n && k + i < steps; ++i) store(to + ptrdiff_t(k + i) * kPanel + j, block[i]);
      }
    }
  }
}

template <int kTile, bool kAcross>
WSSS_ALWAYS_INLINE void multiply_tile(const Product& product, const float* a, const float* b, float* const* c,
                                      int columns) {
  Vec<float> sum[kTile][kVectors] = {};
  if (product.add) {
    unroll<0, kTile>([&](auto i) __attribute__((always_inline)) {
      unroll<0, kVectors>([&](auto v) __attribute__((always_inline)) {
        if (v * n < columns) sum[i][v] = load_some(c[i] + v * n, columns - v * n);
      });
    });
  }
  const ptrdiff_t row = kAcross ? 1 : product.a_row, step = kAcross ? product.a_step : 1;
  for (int k = 0; k < product.steps; ++k, a += step, b += kPanel) {
    Vec<float> right[kVectors];
    unroll<0, kVectors>([&](auto v) __attribute__((always_inline)) { right[v] = in_register<float>(load(b + v * n)); });
    unroll<0, kTile>([&](auto i) __attribute__((always_inline)) {
      const Vec<float> left = in_register<float>(splat(a[i * row]));
      unroll<0, kVectors>([&](auto v) __attribute__((always_inline)) { sum[i][v] += left * right[v]; });
    });
  }
  unroll<0, kTile>([&](auto i) __attribute__((always_inline)) {
    unroll<0, kVectors>([&](auto v) __attribute__((always_inline)) {
      if (v * n < columns) store_some(c[i] + v * n, sum[i][v], columns - v * n);
    });
  });
}

template <bool kAcross>
void multiply_panels(const Product& product) {
  const float* b = product.b;
  for (int first = 0; first < product.columns; first += kPanel, b += ptrdiff_t(product.steps) * kPanel) {
    for (int i = 0; i < product.rows; i += kRows) {
      const int tile = product.rows - i < kRows ? product.rows - i : kRows;
      const float* const a = product.a + i * (kAcross ? 1 : product.a_row);
      float* c[kRows];
      for (int t = 0; t < tile; ++t) {
        c[t] = product.c + product.c_row * (product.rows_of_c ? product.rows_of_c[i + t] : i + t) + first;
      }
      const int columns = product.columns - first;
      unroll<1, kRows + 1>([&](auto t) {
        if (tile == t) multiply_tile<t, kAcross>(product, a, b, c, columns);
      });
    }
  }
}

void multiply(const Product& product) {
  if (product.a_step == 1) {
    multiply_panels<false>(product);
  } else {
    multiply_panels<true>(product);
  }
}

WSSS_ALWAYS_INLINE float total(Vec<float> v) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += v[i];
  return sum;
}

WSSS_ALWAYS_INLINE Vec<float> log(Vec<float> v) { return log2(v) * 0.693147181f; }

// As whole numbers in the order of the floats.
WSSS_ALWAYS_INLINE VecInt in_order(Vec<float> v) {
  const VecInt bits = (VecInt)v;
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// The k-th largest of count values, past which the row holds -infinity: by halves of the range of whole numbers.
float kth_largest(const float* row, int count, int k) {
  int64_t low = INT32_MIN, high = INT32_MAX;  // at least k values are >= low
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    const VecInt pivot = int32_t(middle) - VecInt{};
    VecInt found{};
    for (int j = 0; j < count; j += n) found -= in_order(load(row + j)) >= pivot;
    int64_t above = 0;
    for (int i = 0; i < n; ++i) above += found[i];
    if (above >= k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int32_t ordered = int32_t(low), bits = ordered ^ ((ordered >> 31) & 0x7fffffff);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Scales a row, fills it up with -infinity and returns its maximum; NaN where there is one.
WSSS_ALWAYS_INLINE float scale_row(float* row, int count, ptrdiff_t line, float scale) {
  for (ptrdiff_t j = count; j < line; ++j) row[j] = -kInfinity;
  Vec<float> largest = splat(-kInfinity), odd{};
  for (int j = 0; j < count; j += n) {
    const Vec<float> value = load(row + j) * scale;
    store(row + j, value);
    largest = value > largest ? value : largest;
    odd += value != value ? value : Vec<float>{};
  }
  float most = -kInfinity;
  for (int i = 0; i < n; ++i) most = largest[i] > most ? largest[i] : most;
  return most + total(odd);
}

void attend(const ScoreRows& rows) {
  for (int r = 0; r < rows.rows; ++r) {
    float* const row = rows.scores + r * rows.line;
    float* const stats = rows.stats + ptrdiff_t(r) * kAttentionStats;
    const float most = scale_row(row, rows.count, rows.line, rows.scale);
    Vec<float> sum{};
    for (int j = 0; j < rows.count; j += n) sum += exp(load(row + j) - most);
    const float all = total(sum), inverse = 1.0f / all;
    float cut = -kInfinity;
    if (rows.top_k) cut = kth_largest(row, rows.count, rows.top_k);
    if (rows.log_threshold > -kInfinity) {
      const float least = most + total(log(splat(all))) / n + rows.log_threshold;
      cut = least > cut ? least : cut;
    }
    if (inverse != inverse) cut = inverse;
    float slope = 0;
    if (rows.entropy) {
      Vec<float> entropy{}, slopes{};
      for (int j = 0; j < rows.count; j += n) {
        const Vec<float> a = exp(load(row + j) - most) * inverse, logarithm = log(a + kLeast);
        entropy -= a * logarithm;
        slopes -= a * (logarithm + a / (a + kLeast));
      }
      rows.entropy[r] = total(entropy);
      slope = total(slopes);
    }
    Vec<float> left_over{};
    for (int j = 0; j < rows.count; j += n) {
      const Vec<float> value = load(row + j);
      const Vec<float> weight = value < cut ? Vec<float>{} : exp(value - most);
      left_over += weight;
      store(row + j, weight);
    }
    const float kept = total(left_over), inverse_kept = kept == 0.0f ? 0.0f : 1.0f / kept;
    for (int j = 0; j < rows.count; j += n) store(row + j, load(row + j) * inverse_kept);
    stats[0] = most, stats[1] = inverse, stats[2] = cut, stats[3] = inverse_kept, stats[4] = slope;
  }
}

void differentiate(const GradientRows& rows) {
  for (int r = 0; r < rows.rows; ++r) {
    float* const row = rows.scores + r * rows.line;
    float* const weights = rows.weights + r * rows.line;
    const float* const stats = rows.stats + ptrdiff_t(r) * kAttentionStats;
    const float most = stats[0], inverse = stats[1], cut = stats[2], inverse_kept = stats[3], slope = stats[4];
    scale_row(row, rows.count, rows.line, rows.scale);
    const float of_entropy = rows.grad_entropy ? rows.grad_entropy[r] : 0.0f;
    float mean = 0;
    if (rows.attended) {
      Vec<float> means{};
      for (ptrdiff_t j = rows.count; j < rows.line; ++j) weights[j] = 0;
      for (int j = 0; j < rows.count; j += n) {
        const Vec<float> value = load(row + j);
        const Vec<float> p = value < cut ? Vec<float>{} : exp(value - most) * inverse_kept;
        means += p == 0.0f ? Vec<float>{} : p * load(weights + j);
      }
      mean = total(means);
    }
    for (int j = 0; j < rows.count; j += n) {
      const Vec<float> value = load(row + j), power = exp(value - most);
      Vec<float> change{};
      if (rows.attended) {
        const Vec<float> p = value < cut ? Vec<float>{} : power * inverse_kept;
        store(row + j, p);
        change = p * (load(weights + j) - mean);
      }
      if (rows.grad_entropy) {
        const Vec<float> a = power * inverse;
        change -= of_entropy * a * (log(a + kLeast) + a / (a + kLeast) + slope);
      }
      store(weights + j, change * rows.scale);
    }
  }
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {kPanel, &pack, &pack_rows, &multiply, &attend, &differentiate};

}  // namespace WSSS_ISA
}  // namespace wsss
