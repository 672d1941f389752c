// float16 and bfloat16 by their bits, rounded to nearest even; arithmetic is float's, rounded once more.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "math.h"
#include "vector_types.h"

namespace cuda_on_cpu {

// value / 2^shift, to nearest even
constexpr uint32_t shifted_right(uint32_t value, int shift) {
  const uint32_t rest = value & ((uint32_t(1) << shift) - 1), half = uint32_t(1) << (shift - 1);
  const uint32_t floor = value >> shift;
  return floor + (rest > half || (rest == half && (floor & 1)));
}

struct HalfBits {
  static uint16_t from(float value);
  static float to(uint16_t bits);
};
struct Bfloat16Bits {
  static uint16_t from(float value);
  static float to(uint16_t bits);
};

inline uint16_t HalfBits::from(float value) {
  const uint32_t bits = bits_as<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and up
  if (magnitude >= 0x38800000) return uint16_t(sign | (shifted_right(magnitude, 13) - (112u << 10)));
  const int shift = 126 - int(magnitude >> 23);  // subnormal: units of 2^-24
  if (shift > 24) return uint16_t(sign);
  return uint16_t(sign | shifted_right((magnitude & 0x7fffff) | 0x800000, shift));
}

// From double in one rounding: to odd in float first, which has bits to spare.
inline float rounded_to_odd(double value) {
  const float near = float(value);
  if (double(near) == value || value != value || std::isinf(near)) return near;
  const uint32_t bits = bits_as<uint32_t>(near);
  if (bits & 1) return near;
  const bool away = std::fabs(double(near)) > std::fabs(value);
  return bits_as<float>(away ? bits - 1 : bits + 1);
}

inline float HalfBits::to(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 31) return bits_as<float>(sign | 0x7f800000 | fraction << 13);
  if (exponent != 0) return bits_as<float>(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = float(fraction) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -magnitude : magnitude;
}

inline uint16_t Bfloat16Bits::from(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t(shifted_right(bits & 0x7fffffff, 16) | (bits >> 16 & 0x8000));
}

inline float Bfloat16Bits::to(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }

// Of both types: tells how, by Bits::from(float) and Bits::to(uint16_t).
template <class Bits>
struct SmallFloat {
  uint16_t bits;

  SmallFloat() = default;
  SmallFloat(float value) : bits(Bits::from(value)) {}
  SmallFloat(double value) : bits(Bits::from(rounded_to_odd(value))) {}
  template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer>>>
  SmallFloat(Integer value) : SmallFloat(double(value)) {}
  operator float() const { return Bits::to(bits); }

  static SmallFloat of_bits(uint16_t bits) {
    SmallFloat made;
    made.bits = bits;
    return made;
  }
  SmallFloat& operator+=(SmallFloat other) { return *this = *this + other; }
  SmallFloat& operator-=(SmallFloat other) { return *this = *this - other; }
  SmallFloat& operator*=(SmallFloat other) { return *this = *this * other; }
  SmallFloat& operator/=(SmallFloat other) { return *this = *this / other; }
  friend SmallFloat operator+(SmallFloat a, SmallFloat b) { return float(a) + float(b); }
  friend SmallFloat operator-(SmallFloat a, SmallFloat b) { return float(a) - float(b); }
  friend SmallFloat operator*(SmallFloat a, SmallFloat b) { return float(a) * float(b); }
  friend SmallFloat operator/(SmallFloat a, SmallFloat b) { return float(a) / float(b); }
  friend SmallFloat operator-(SmallFloat a) { return of_bits(a.bits ^ 0x8000); }
  friend bool operator==(SmallFloat a, SmallFloat b) { return float(a) == float(b); }
  friend bool operator!=(SmallFloat a, SmallFloat b) { return float(a) != float(b); }
  friend bool operator<(SmallFloat a, SmallFloat b) { return float(a) < float(b); }
  friend bool operator>(SmallFloat a, SmallFloat b) { return float(a) > float(b); }
  friend bool operator<=(SmallFloat a, SmallFloat b) { return float(a) <= float(b); }
  friend bool operator>=(SmallFloat a, SmallFloat b) { return float(a) >= float(b); }
};

template <class Bits>
struct alignas(4) SmallFloat2 {
  SmallFloat<Bits> x, y;
};

}  // namespace cuda_on_cpu

// What CUDA names alike for both types.
#define CUDA_ON_CPU_UNARY(name, expression) \
  template <class B>                        \
  auto name(cuda_on_cpu::SmallFloat<B> a) { \
    return expression;                      \
  }
#define CUDA_ON_CPU_BINARY(name, expression)                              \
  template <class B>                                                      \
  auto name(cuda_on_cpu::SmallFloat<B> a, cuda_on_cpu::SmallFloat<B> b) { \
    return expression;                                                    \
  }
#define CUDA_ON_CPU_BINARY2(name, one)                                                             \
  template <class B>                                                                               \
  cuda_on_cpu::SmallFloat2<B> name(cuda_on_cpu::SmallFloat2<B> a, cuda_on_cpu::SmallFloat2<B> b) { \
    return {one(a.x, b.x), one(a.y, b.y)};                                                         \
  }
CUDA_ON_CPU_UNARY(__hneg, -a)
CUDA_ON_CPU_UNARY(__habs, cuda_on_cpu::SmallFloat<B>::of_bits(a.bits & 0x7fff))
CUDA_ON_CPU_UNARY(__hisnan, float(a) != float(a))
CUDA_ON_CPU_UNARY(hexp, cuda_on_cpu::SmallFloat<B>(std::exp(float(a))))
CUDA_ON_CPU_UNARY(hsqrt, cuda_on_cpu::SmallFloat<B>(std::sqrt(float(a))))
CUDA_ON_CPU_BINARY(__hadd, a + b)
CUDA_ON_CPU_BINARY(__hsub, a - b)
CUDA_ON_CPU_BINARY(__hmul, a* b)
CUDA_ON_CPU_BINARY(__hdiv, a / b)
CUDA_ON_CPU_BINARY(__hmax, cuda_on_cpu::SmallFloat<B>(std::fmax(float(a), float(b))))
CUDA_ON_CPU_BINARY(__hmin, cuda_on_cpu::SmallFloat<B>(std::fmin(float(a), float(b))))
CUDA_ON_CPU_BINARY(__heq, a == b)
CUDA_ON_CPU_BINARY(__hne, a != b)
CUDA_ON_CPU_BINARY(__hlt, a < b)
CUDA_ON_CPU_BINARY(__hle, a <= b)
CUDA_ON_CPU_BINARY(__hgt, a > b)
CUDA_ON_CPU_BINARY(__hge, a >= b)
CUDA_ON_CPU_BINARY2(__hadd2, __hadd)
CUDA_ON_CPU_BINARY2(__hsub2, __hsub)
CUDA_ON_CPU_BINARY2(__hmul2, __hmul)
CUDA_ON_CPU_BINARY2(__hmax2, __hmax)
CUDA_ON_CPU_BINARY2(__hmin2, __hmin)
#undef CUDA_ON_CPU_UNARY
#undef CUDA_ON_CPU_BINARY
#undef CUDA_ON_CPU_BINARY2
template <class B>
cuda_on_cpu::SmallFloat2<B> __habs2(cuda_on_cpu::SmallFloat2<B> a) {
  return {__habs(a.x), __habs(a.y)};
}
template <class B>
cuda_on_cpu::SmallFloat<B> __hfma(cuda_on_cpu::SmallFloat<B> a, cuda_on_cpu::SmallFloat<B> b,
                                  cuda_on_cpu::SmallFloat<B> c) {
  return std::fma(double(float(a)), double(float(b)), double(float(c)));
}
template <class B>
cuda_on_cpu::SmallFloat2<B> __hfma2(cuda_on_cpu::SmallFloat2<B> a, cuda_on_cpu::SmallFloat2<B> b,
                                    cuda_on_cpu::SmallFloat2<B> c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
