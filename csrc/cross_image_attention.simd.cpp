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
static_assert(kAttentionPanel % kPanel == 0);
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

void pack_rows(const float* from, ptrdiff_t row, const int32_t* index, int steps, int columns, float* to,
               ptrdiff_t to_row, ptrdiff_t to_panel) {
  for (int first = 0; first < columns; first += kPanel, to += to_panel) {
    for (int j = 0; j < kPanel; j += n) {
      const float* source[n];
      int there = columns - first - j;
      there = there < 0 ? 0 : there < n ? there : n;
      for (int i = 0; i < there; ++i) source[i] = from + row * (index ? index[first + j + i] : first + j + i);
      for (int k = 0; k < steps; k += n) {
        Vec<float> block[n];
        for (int i = 0; i < n; ++i) block[i] = i < there ? load_some(source[i] + k, steps - k) : Vec<float>{};
        transpose<float>(block);
        for (int i = 0; i < n && k + i < steps; ++i) store(to + (k + i) * to_row + j, block[i]);
      }
    }
  }
}

void add_transposed(const float* from, ptrdiff_t row, int rows, int columns, const int32_t* index, float* to,
                    ptrdiff_t to_row) {
  for (int i = 0; i < rows; i += n) {
    for (int j = 0; j < columns; j += n) {
      Vec<float> block[n];
      for (int k = 0; k < n; ++k) {
        block[k] = i + k < rows ? load_some(from + (i + k) * row + j, columns - j) : Vec<float>{};
      }
      transpose<float>(block);
      for (int k = 0; k < n && j + k < columns; ++k) {
        float* const target = to + index[j + k] * to_row + i;
        store_some(target, load_some(target, rows - i) + block[k], rows - i);
      }
    }
  }
}

template <int kTile, int kWide, bool kAcross>
WSSS_ALWAYS_INLINE void multiply_tile(const Product& product, const float* a, const float* b, float* c,
                                      const float* start, int columns) {
  Vec<float> sum[kTile][kWide] = {};
  if (product.add || start) {
    unroll<0, kTile>([&](auto i) __attribute__((always_inline)) {
      unroll<0, kWide>([&](auto v) __attribute__((always_inline)) {
        sum[i][v] = start ? splat(start[i]) : load_some(c + i * product.c_row + v * n, columns - v * n);
      });
    });
  }
  const ptrdiff_t row = kAcross ? 1 : product.a_row, step = kAcross ? product.a_step : 1;
  for (int k = 0; k < product.steps; ++k, a += step, b += kPanel) {
    Vec<float> right[kWide];
    unroll<0, kWide>([&](auto v) __attribute__((always_inline)) { right[v] = in_register<float>(load(b + v * n)); });
    unroll<0, kTile>([&](auto i) __attribute__((always_inline)) {
      const Vec<float> left = in_register<float>(splat(a[i * row]));
      unroll<0, kWide>([&](auto v) __attribute__((always_inline)) { sum[i][v] += left * right[v]; });
    });
  }
  unroll<0, kTile>([&](auto i) __attribute__((always_inline)) {
    unroll<0, kWide>([&](auto v) __attribute__((always_inline)) {
      store_some(c + i * product.c_row + v * n, sum[i][v], columns - v * n);
    });
  });
}

template <int kWide, bool kAcross>
void multiply_panel(const Product& product, const float* b, int first, int columns) {
  for (int i = 0; i < product.rows; i += kRows) {
    const int tile = product.rows - i < kRows ? product.rows - i : kRows;
    const float* const a = product.a + i * (kAcross ? 1 : product.a_row);
    const float* const start = product.start ? product.start + i : nullptr;
    float* const c = product.c + i * product.c_row + first;
    for (int t = kRows; t < 2 * kRows && i + t < product.rows; ++t) {  // what the next tile begins with
      for (int v = 0; v < kWide; ++v) __builtin_prefetch(c + t * product.c_row + v * n, 1);
      if (!kAcross) __builtin_prefetch(a + t * product.a_row);
    }
    unroll<1, kRows + 1>([&](auto t) {
      if (tile == t) multiply_tile<t, kWide, kAcross>(product, a, b, c, start, columns);
    });
  }
}

template <bool kAcross>
void multiply_panels(const Product& product) {
  const float* b = product.b;
  for (int first = 0; first < product.columns; first += kPanel, b += product.b_panel) {
    const int columns = product.columns - first < kPanel ? product.columns - first : kPanel;
    unroll<1, kVectors + 1>([&](auto v) {
      if ((columns + n - 1) / n == v) multiply_panel<v, kAcross>(product, b, first, columns);
    });
  }
}

void multiply(const Product& product) {
  if (product.a_step == 1) {
    multiply_panels<false>(product);
  } else {
    multiply_panels<true>(product);
  }
}

WSSS_ALWAYS_INLINE Vec<float> log(Vec<float> v) { return log2(v) * 0.693147181f; }

// The k-th largest of each of n columns, bit by bit from the top, as whole numbers in the order of the floats.
Vec<float> kth_largest(const float* scores, int count, int k) {
  constexpr int32_t kSign = INT32_MIN;  // turns the order of signed numbers into that of their bits
  VecInt bits{};
  for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
    const VecInt candidate = bits | int32_t(bit), pivot = candidate ^ kSign;
    VecInt found{};
    for (int m = 0; m < count; ++m) {
      const VecInt value = (VecInt)load(scores + m * kPanel);
      found -= (value ^ ((value >> 31) & INT32_MAX)) >= pivot;
    }
    bits = found >= k ? candidate : bits;
  }
  const VecInt ordered = bits ^ kSign;
  return (Vec<float>)(ordered ^ ((ordered >> 31) & INT32_MAX));
}

// Stored, so that no difference of it is fused with the product: the maximum has been rounded as well.
WSSS_ALWAYS_INLINE void scale_columns(float* scores, int count, float scale) {
  for (int m = 0; m < count; ++m) store(scores + m * kPanel, load(scores + m * kPanel) * scale);
}

void attend(const ScoreColumns& columns) {
  const int count = columns.count;
  const bool selects = columns.top_k || columns.log_threshold > -kInfinity;
  for (int first = 0; first < columns.columns; first += n) {
    float* const scores = columns.scores + first;
    scale_columns(scores, count, columns.scale);
    Vec<float> most = splat(-kInfinity), odd{};
    for (int m = 0; m < count; ++m) {
      const Vec<float> value = load(scores + m * kPanel);
      most = value > most ? value : most;
      odd += value != value ? value : Vec<float>{};
    }
    most += odd;
    Vec<float> sum{};
    for (int m = 0; m < count; ++m) sum += exp(load(scores + m * kPanel) - most);
    const Vec<float> inverse = 1.0f / sum;
    Vec<float> entropy{}, slope{};
    if (columns.entropy) {
      for (int m = 0; m < count; ++m) {
        const Vec<float> a = exp(load(scores + m * kPanel) - most) * inverse, logarithm = log(a + kLeast);
        entropy -= a * logarithm;
        slope -= a * (logarithm + a / (a + kLeast));
      }
    }
    Vec<float> cut = splat(-kInfinity);
    if (columns.top_k) cut = kth_largest(scores, count, columns.top_k);
    if (columns.log_threshold > -kInfinity) {
      const Vec<float> least = most + log(sum) + columns.log_threshold;
      cut = least > cut ? least : cut;
    }
    cut = inverse != inverse ? inverse : cut;
    Vec<float> kept = sum;
    if (selects) {
      kept = Vec<float>{};
      for (int m = 0; m < count; ++m) {
        const Vec<float> value = load(scores + m * kPanel);
        kept += value < cut ? Vec<float>{} : exp(value - most);
      }
    }
    const Vec<float> inverse_kept = kept == 0.0f ? Vec<float>{} : 1.0f / kept;
    for (int m = 0; m < count; ++m) {
      const Vec<float> value = load(scores + m * kPanel);
      store(scores + m * kPanel, value < cut ? Vec<float>{} : exp(value - most) * inverse_kept);
    }
    for (int i = 0; i < n && first + i < columns.columns; ++i) {
      float* const stats = columns.stats + ptrdiff_t(first + i) * kAttentionStats;
      stats[0] = most[i], stats[1] = inverse[i], stats[2] = cut[i], stats[3] = inverse_kept[i], stats[4] = slope[i];
      if (columns.entropy) columns.entropy[first + i] = entropy[i];
    }
  }
}

void differentiate(const GradientColumns& columns) {
  for (int first = 0; first < columns.columns; first += n) {
    float* const scores = columns.scores + first;
    float* const weights = columns.weights + first;
    Vec<float> stats[kAttentionStats] = {}, of_entropy{};
    for (int i = 0; i < n && first + i < columns.columns; ++i) {
      for (int s = 0; s < kAttentionStats; ++s) stats[s][i] = columns.stats[(first + i) * kAttentionStats + s];
      if (columns.grad_entropy) of_entropy[i] = columns.grad_entropy[first + i];
    }
    const Vec<float> most = stats[0], inverse = stats[1], cut = stats[2], inverse_kept = stats[3], slope = stats[4];
    if (!columns.known) scale_columns(scores, columns.count, columns.scale);
    Vec<float> mean{};
    if (columns.attended) {
      for (int m = 0; m < columns.count; ++m) {
        Vec<float> p = load(scores + m * kPanel);
        if (!columns.known) p = p < cut ? Vec<float>{} : exp(p - most) * inverse_kept;
        mean += p == 0.0f ? Vec<float>{} : p * load(weights + m * kPanel);
      }
    }
    for (int m = 0; m < columns.count; ++m) {
      Vec<float> change{}, p = load(scores + m * kPanel);
      if (!columns.known) {
        const Vec<float> power = exp(p - most);
        p = p < cut ? Vec<float>{} : power * inverse_kept;
        store(scores + m * kPanel, p);
        if (columns.grad_entropy) {
          const Vec<float> a = power * inverse;
          change = -of_entropy * a * (log(a + kLeast) + a / (a + kLeast) + slope);
        }
      }
      if (columns.attended) change += p * (load(weights + m * kPanel) - mean);
      store(weights + m * kPanel, change * columns.scale);
    }
  }
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {n,         kPanel,  &pack,         &pack_rows, &add_transposed,
                                            &multiply, &attend, &differentiate};

}  // namespace WSSS_ISA
}  // namespace wsss
