// dim3 and the vectors, aligned as CUDA aligns them.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

#define CUDA_ON_CPU_VECTORS(Element, name, align2, align4)                  \
  struct name##1 { Element x; };                                            \
  struct alignas(align2) name##2 { Element x, y; };                         \
  struct alignas(align4) name##4 { Element x, y, z, w; };                   \
  constexpr name##1 make_##name##1(Element x) { return {x}; }               \
  constexpr name##2 make_##name##2(Element x, Element y) { return {x, y}; } \
  constexpr name##4 make_##name##4(Element x, Element y, Element z, Element w) { return {x, y, z, w}; }

#define CUDA_ON_CPU_VECTOR3(Element, name) \
  struct name##3 { Element x, y, z; };     \
  constexpr name##3 make_##name##3(Element x, Element y, Element z) { return {x, y, z}; }

CUDA_ON_CPU_VECTORS(signed char, char, 2, 4)
CUDA_ON_CPU_VECTORS(unsigned char, uchar, 2, 4)
CUDA_ON_CPU_VECTORS(short, short, 4, 8)
CUDA_ON_CPU_VECTORS(unsigned short, ushort, 4, 8)
CUDA_ON_CPU_VECTORS(int, int, 8, 16)
CUDA_ON_CPU_VECTORS(unsigned, uint, 8, 16)
CUDA_ON_CPU_VECTORS(float, float, 8, 16)
CUDA_ON_CPU_VECTOR3(signed char, char)
CUDA_ON_CPU_VECTOR3(unsigned char, uchar)
CUDA_ON_CPU_VECTOR3(short, short)
CUDA_ON_CPU_VECTOR3(unsigned short, ushort)
CUDA_ON_CPU_VECTOR3(int, int)
CUDA_ON_CPU_VECTOR3(float, float)

#undef CUDA_ON_CPU_VECTORS
#undef CUDA_ON_CPU_VECTOR3

constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
constexpr double2 make_double2(double x, double y) { return {x, y}; }
constexpr longlong2 make_longlong2(long long x, long long y) { return {x, y}; }
constexpr ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }
