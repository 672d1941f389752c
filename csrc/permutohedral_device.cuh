// What the kernels on the lattice share.
#pragma once
#include "common/cuda_launch.h"
#include "permutohedral_cuda.h"

namespace wsss {

// body(row, first column, columns from one to the next), row < count: the threads of a row together.
template <class Body>
__device__ __forceinline__ void for_each_row(const LatticeRows& rows, uint32_t count, Body body) {
  const uint32_t thread = blockIdx.x * kLatticeThreads + threadIdx.x;
  const uint32_t together = (gridDim.x * kLatticeThreads) >> rows.lane_bits;
  const int lanes = 1 << rows.lane_bits, lane = int(thread) & (lanes - 1);
  for (uint32_t row = thread >> rows.lane_bits; row < count; row += together) body(row, lane, lanes);
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float4 operator*(float s, float4 v) {
  return make_float4(s * v.x, s * v.y, s * v.z, s * v.w);
}

__device__ __forceinline__ const float* blurred_values(const CudaLattice& lattice) {
  return lattice.vertices % 2 == 0 ? lattice.values[0] : lattice.values[1];
}

// sum over the vertices of a pixel of weight x value, of one column.
template <int kVertices>
__device__ __forceinline__ float4 slice_simplex(const LatticeLink* links, const float4* values, int columns) {
  LatticeLink link[kVertices];
#pragma unroll
  for (int k = 0; k < kVertices; ++k) link[k] = links[k];
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int k = 0; k < kVertices; ++k) sum = sum + link[k].weight * values[size_t(link[k].at) * columns];
  return sum;
}

// pixel: of all images, those that share points included.
__device__ __forceinline__ float4 slice(const CudaLattice& lattice, uint32_t pixel, int columns, int column) {
  const uint32_t copy = pixel / lattice.pixels, own = pixel - copy * lattice.pixels;
  const float4* const values =
      reinterpret_cast<const float4*>(blurred_values(lattice)) + size_t(copy) * lattice.capacity * columns + column;
  const LatticeLink* const links = lattice.links + size_t(own) * lattice.vertices;
  return lattice.vertices == 6 ? slice_simplex<6>(links, values, columns) : slice_simplex<3>(links, values, columns);
}

// Planes [images, labels, H, W].
struct LatticePlanes {
  uint32_t pixels, plane;  // of all images, of one
  int labels;

  __device__ size_t at(uint32_t pixel, int label) const {
    const uint32_t image = pixel / plane;
    return (size_t(image) * labels + label) * plane + (pixel - image * plane);
  }
};

// body(label, its element of four) for those that there are.
template <class Body>
__device__ __forceinline__ void for_each_label(int column, int labels, float4& four, Body body) {
  if (4 * column < labels) body(4 * column, four.x);
  if (4 * column + 1 < labels) body(4 * column + 1, four.y);
  if (4 * column + 2 < labels) body(4 * column + 2, four.z);
  if (4 * column + 3 < labels) body(4 * column + 3, four.w);
}

}  // namespace wsss
