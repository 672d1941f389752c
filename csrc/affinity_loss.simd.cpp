#include "affinity_loss_kernels.h"
#include "common/simd_math.h"

namespace wsss {
namespace WSSS_ISA {

constexpr int n = kLanes<float>;
using V = Vec<float>;

constexpr float kEpsilon = 1e-5f;
constexpr int kFlush = 32;  // vectors added up in float32 before they go to double precision

WSSS_ALWAYS_INLINE VecInt load_codes(const int32_t* p) {
  VecInt v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

WSSS_ALWAYS_INLINE V masked(VecInt mask, V v) { return (V)(mask & (VecInt)v); }
WSSS_ALWAYS_INLINE V choose(VecInt mask, V yes, V no) { return (V)((mask & (VecInt)yes) | (~mask & (VecInt)no)); }

// log(x) for x > 0 and normal, where x - 1 is known better than x is: 1 + 1e-5 alone is 0.1 % off in the logarithm.
WSSS_ALWAYS_INLINE V log_near_one(V x, V minus_one) {
  const VecInt bits = (VecInt)x;
  const VecInt e = (bits - 0x3f3504f3) >> 23;
  const V f = choose((VecInt)(e == 0), minus_one, (V)(bits - (e << 23)) - 1.0f);
  V p = splat(7.0376836292e-2f);  // log(1 + f) = f - f^2/2 + f^3 p(f)
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const V square = f * f;
  const V y = __builtin_convertvector(e, V) * 0.693147182f + (f + (p * square * f - 0.5f * square));
  return x != x ? x : y;
}

struct Pairs {
  VecInt bg, fg, neg;
};
WSSS_ALWAYS_INLINE Pairs classify(const LossRow& row, size_t line, int k, int x) {
  const VecInt from = load_codes(row.sources + x);
  const VecInt to = load_codes(row.codes + size_t(row.hood->dy[k]) * line + row.hood->dx[k] + x);
  const VecInt paired = ((from | to) >= 0), like = paired & (from == to);
  const VecInt background = like & (from == 0);
  return {background, like & ~background, paired & ~like};
}

WSSS_ALWAYS_INLINE V in_range(V a) { return a < 0.0f ? V{} : (a > 1.0f ? splat(1.0f) : a); }

WSSS_ALWAYS_INLINE double total(V v) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += double(v[i]);
  return sum;
}

void sums(const LossRow& row, double* sums, double* counts) {
  const size_t line = code_line(row.width);
  V sum[kPairClasses] = {};
  VecInt count[kPairClasses] = {};
  int added = 0;
  for (int c = 0; c < kPairClasses; ++c) sums[c] = counts[c] = 0;
  const auto flush = [&]() __attribute__((always_inline)) {
    for (int c = 0; c < kPairClasses; ++c) {
      sums[c] -= total(sum[c]);
      sum[c] = V{};
    }
    added = 0;
  };
  for (int k = 0; k < row.hood->count; ++k) {
    const float* const affinity = row.affinity + k * row.plane;
    for (int x = 0; x < row.width; x += n) {
      const Pairs pairs = classify(row, line, k, x);
      const V a = in_range(load_some(affinity + x, row.width - x));
      const V argument = choose(pairs.neg, 1.0f - a, a) + kEpsilon;
      const V log = log_near_one(argument, choose(pairs.neg, V{} - a, a - 1.0f) + kEpsilon);
      sum[0] += masked(pairs.bg, log);
      sum[1] += masked(pairs.fg, log);
      sum[2] += masked(pairs.neg, log);
      count[0] -= pairs.bg;
      count[1] -= pairs.fg;
      count[2] -= pairs.neg;
      if (++added == kFlush) flush();
    }
  }
  flush();
  for (int c = 0; c < kPairClasses; ++c) {
    for (int i = 0; i < n; ++i) counts[c] += count[c][i];
  }
}

void gradient(const LossRow& row, const float* weights, float* grad_affinity) {
  const size_t line = code_line(row.width);
  const V bg = splat(-weights[0]), fg = splat(-weights[1]), neg = splat(weights[2]);
  for (int k = 0; k < row.hood->count; ++k) {
    for (int x = 0; x < row.width; x += n) {
      const Pairs pairs = classify(row, line, k, x);
      const V a = load_some(row.affinity + k * row.plane + x, row.width - x);
      const V weight = choose(pairs.neg, neg, choose(pairs.bg, bg, masked(pairs.fg, fg)));
      const V slope = weight / (choose(pairs.neg, 1.0f - a, a) + kEpsilon);
      const VecInt counted = (pairs.bg | pairs.fg | pairs.neg) & ~((VecInt)(a < 0.0f) | (VecInt)(a > 1.0f));
      store_some(grad_affinity + k * row.plane + x, masked(counted, slope), row.width - x);
    }
  }
}

extern const LossKernels loss_kernels;
constexpr LossKernels loss_kernels = {sums, gradient};

}  // namespace WSSS_ISA
}  // namespace wsss
