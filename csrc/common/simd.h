// Vectors for the files compiled once per instruction set (CMakeLists.txt sets WSSS_ISA and WSSS_VECTOR_BYTES).
// Everything here lives in the instruction set's own namespace, so that no inline function compiled for a newer
// processor is ever linked into code meant for an older one. For the same reason these files use no C++ library.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "neighbourhood.h"

#if !defined(WSSS_ISA) || !defined(WSSS_VECTOR_BYTES)
#error "only for the kernel files that CMakeLists.txt compiles once per instruction set"
#endif

namespace wsss {
namespace WSSS_ISA {

template <class T>
struct Simd {
  static constexpr int lanes = WSSS_VECTOR_BYTES / sizeof(T);
  typedef T Vec __attribute__((vector_size(WSSS_VECTOR_BYTES)));
};
template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
inline constexpr int kLanes = Simd<T>::lanes;

template <class T>
WSSS_ALWAYS_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
WSSS_ALWAYS_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class T>
WSSS_ALWAYS_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}

// The first `count` values (all where count >= lanes); the rest of the vector is 0, and is not written.
WSSS_ALWAYS_INLINE Vec<float> load_some(const float* p, int count) {
  if (count >= kLanes<float>) return load(p);
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
#else
  float values[kLanes<float>] = {};
  for (int i = 0; i < count; ++i) values[i] = p[i];
  return load(values);
#endif
}
WSSS_ALWAYS_INLINE void store_some(float* p, Vec<float> v, int count) {
  if (count >= kLanes<float>) return store(p, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
#else
  for (int i = 0; i < count; ++i) p[i] = v[i];
#endif
}

// store to whole, aligned vectors past the caches, which spares reading the lines first; other threads see them after
// finish_streaming.
WSSS_ALWAYS_INLINE void stream(float* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__x86_64__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
WSSS_ALWAYS_INLINE void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

WSSS_ALWAYS_INLINE Vec<float> square_root(Vec<float> v) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_sqrt_ps(__mmask16(-1), (__m512)v);
#elif defined(__AVX__)
  return (Vec<float>)_mm256_sqrt_ps((__m256)v);
#elif defined(__x86_64__)
  return (Vec<float>)_mm_sqrt_ps((__m128)v);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// A vector of floats as doubles: two vectors.
struct DoublePair {
  Vec<double> low, high;
};
WSSS_ALWAYS_INLINE DoublePair widen(Vec<float> v) {
  typedef float Half __attribute__((vector_size(WSSS_VECTOR_BYTES / 2)));
  Half low, high;
  std::memcpy(&low, &v, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  return {__builtin_convertvector(low, Vec<double>), __builtin_convertvector(high, Vec<double>)};
}

WSSS_ALWAYS_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }
// A prefetch into a page whose address is not in the TLB is dropped: a load from each page first (but for the last one,
// where p lies inside a page).
template <class T>
void open_pages(const T* p, int64_t count) {
  constexpr int64_t page = 4096 / sizeof(T);
  for (int64_t i = 0; i < count; i += page) [[maybe_unused]]
    const volatile T opened = static_cast<const volatile T*>(p)[i];
}

// Keeps a loaded value in its register: compilers like to fold a load into each of its uses, and loads are what bounds
// a stencil.
template <class T>
WSSS_ALWAYS_INLINE Vec<T> in_register(Vec<T> v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#endif
  return v;
}

// Compile-time loop: body(std::integral_constant-like index), unrolled whatever the optimiser thinks.
template <int I>
struct Index {
  static constexpr int value = I;
  constexpr operator int() const { return I; }
};
template <int Begin, int End, class Body>
WSSS_ALWAYS_INLINE void unroll(Body&& body) {
  if constexpr (Begin < End) {
    body(Index<Begin>{});
    unroll<Begin + 1, End>(body);
  }
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

// One lane up or down along a row, zero moving in.
template <class T, int... I>
WSSS_ALWAYS_INLINE Vec<T> next_lane(Vec<T> v, Indices<I...>) {
  return __builtin_shufflevector(v, Vec<T>{}, (I + 1)...);
}
template <class T, int... I>
WSSS_ALWAYS_INLINE Vec<T> previous_lane(Vec<T> v, Indices<I...>) {
  return __builtin_shufflevector(v, Vec<T>{}, (I == 0 ? int(sizeof...(I)) : I - 1)...);
}
template <class T>
WSSS_ALWAYS_INLINE Vec<T> next_lane(Vec<T> v) {
  return next_lane<T>(v, typename MakeIndices<kLanes<T>>::type{});
}
template <class T>
WSSS_ALWAYS_INLINE Vec<T> previous_lane(Vec<T> v) {
  return previous_lane<T>(v, typename MakeIndices<kLanes<T>>::type{});
}

// Pairs of lanes added, then pairs of pairs, ...
template <class T, int D, int... I>
WSSS_ALWAYS_INLINE T sum_of_pairs(Vec<T> v, Indices<I...> lanes) {
  if constexpr (D == 0) {
    return v[0];
  } else {
    return sum_of_pairs<T, D / 2>(v + __builtin_shufflevector(v, v, (I ^ D)...), lanes);
  }
}
template <class T>
WSSS_ALWAYS_INLINE T sum_of_lanes(Vec<T> v) {
  return sum_of_pairs<T, kLanes<T> / 2>(v, typename MakeIndices<kLanes<T>>::type{});
}

template <class T, int D, int... I>
WSSS_ALWAYS_INLINE void exchange(Vec<T>& a, Vec<T>& b, Indices<I...>) {
  constexpr int n = sizeof...(I);
  const Vec<T> low = __builtin_shufflevector(a, b, ((I & D) ? n + I - D : I)...);
  const Vec<T> high = __builtin_shufflevector(a, b, ((I & D) ? n + I : I + D)...);
  a = low;
  b = high;
}
// Square transpose in registers: rows[i][j] <-> rows[j][i].
template <class T, int D = kLanes<T> / 2>
WSSS_ALWAYS_INLINE void transpose(Vec<T>* rows) {
  unroll<0, kLanes<T>>([&](auto i) __attribute__((always_inline)) {
    if constexpr ((i.value & D) == 0) exchange<T, D>(rows[i], rows[i + D], typename MakeIndices<kLanes<T>>::type{});
  });
  if constexpr (D > 1) transpose<T, D / 2>(rows);
}

}  // namespace WSSS_ISA
}  // namespace wsss
