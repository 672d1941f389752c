// exp and pow on vectors: a few units in the last place, NaN in is NaN out, results under the smallest normal number
// are 0. Compiled once per instruction set, like simd.h.
#pragma once
#include "simd.h"

extern "C" double pow(double, double);

namespace wsss {
namespace WSSS_ISA {

typedef int32_t VecInt __attribute__((vector_size(WSSS_VECTOR_BYTES)));

WSSS_ALWAYS_INLINE Vec<float> abs(Vec<float> v) { return (Vec<float>)((VecInt)v & 0x7fffffff); }

WSSS_ALWAYS_INLINE Vec<float> exp2(Vec<float> x) {
  const Vec<float> floor = splat(-127.0f), ceiling = splat(128.0f);
  const Vec<float> clamped = x < floor ? floor : (x > ceiling ? ceiling : x);
  const Vec<float> shifted = clamped + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x)
  const Vec<float> f = clamped - (shifted - 12582912.0f);
  Vec<float> p = splat(1.53533619e-4f);  // minimax of 2^f on [-1/2, 1/2]
  p = p * f + 1.33988744e-3f;
  p = p * f + 9.61843736e-3f;
  p = p * f + 5.55033074e-2f;
  p = p * f + 2.40226479e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
  const VecInt n = (VecInt)shifted - (VecInt)splat(12582912.0f);
  // 2^n in two halves: n = 128 alone has no float of its own.
  const VecInt half = n >> 1;
  const Vec<float> y = p * (Vec<float>)((half + 127) << 23) * (Vec<float>)((n - half + 127) << 23);
  return x < -126.0f ? Vec<float>{} : y;
}

WSSS_ALWAYS_INLINE Vec<float> exp(Vec<float> x) { return exp2(x * 1.44269504f); }

WSSS_ALWAYS_INLINE Vec<float> log2(Vec<float> x) {  // x > 0 and normal
  const VecInt bits = (VecInt)x;
  const VecInt e = (bits - 0x3f3504f3) >> 23;  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
  const Vec<float> f = (Vec<float>)(bits - (e << 23)) - 1.0f;
  Vec<float> p = splat(7.0376836292e-2f);  // log(1 + f) = f - f^2/2 + f^3 p(f)
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec<float> square = f * f;
  const Vec<float> log1p = f + (p * square * f - 0.5f * square);
  const Vec<float> y = __builtin_convertvector(e, Vec<float>) + log1p * 1.44269504f;
  return x != x ? x : y;
}

// base^exponent, 0 where base <= 0; whole exponents by squaring.
WSSS_ALWAYS_INLINE void power(float* values, size_t count, double exponent) {  // count a multiple of the lanes
  constexpr int n = kLanes<float>;
  const bool whole = exponent >= 0 && exponent <= 64 && exponent == double(int(exponent));
  if (whole) {
    for (size_t i = 0; i < count; i += n) {
      const Vec<float> base = load(values + i);
      Vec<float> square = base, product = splat(1.0f);
      for (int bits = int(exponent); bits; bits >>= 1) {
        if (bits & 1) product *= square;
        square *= square;
      }
      store(values + i, base <= 0.0f ? Vec<float>{} : product);
    }
  } else {
    const float finite = exponent < 1e30 ? float(exponent) : 1e30f;  // infinity times log2(1) would be NaN
    for (size_t i = 0; i < count; i += n) {
      const Vec<float> base = load(values + i);
      store(values + i, base <= 0.0f ? Vec<float>{} : exp2(finite * log2(base)));
    }
  }
}

WSSS_ALWAYS_INLINE void power(double* values, size_t count, double exponent) {
  for (size_t i = 0; i < count; ++i) values[i] = values[i] <= 0 ? 0 : ::pow(values[i], exponent);
}

}  // namespace WSSS_ISA
}  // namespace wsss
