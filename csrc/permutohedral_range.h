// Which lattice points an image can touch, whatever its colours.
#pragma once
#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "permutohedral_kernels.h"

namespace wsss {

// Coordinate i of a point is (dim + 1) q_i + remainder for every i < dim (the last is implied);
// low_i <= q_i < low_i + values_i, neighbours of what the image touches included.
struct LatticeRange {
  int low[kMaxLatticeDim], values[kMaxLatticeDim];
};

// What brings a coordinate to the lattice's scale.
inline double lattice_scale(int dim, int i) {
  return std::sqrt(2.0 / 3) * (dim + 1) / std::sqrt((i + 1.0) * (i + 2.0));
}

// std::invalid_argument where float32 cannot tell the points apart, or 31 bits the pixels' vertices.
inline LatticeRange lattice_range(const LatticeSpace& space) {
  constexpr double kLargest = 1 << 21, kMostVertices = double(1u << 31);
  const int dim = space.dim;
  // Coordinate j of an elevated vector is sum of c_i over i >= j less j c_(j-1), 0 <= c_i <= most_i.
  double most[kMaxLatticeDim], above = 0;
  for (int i = 0; i < dim; ++i) {
    const double range = i == 0 ? double(space.width) : i == 1 ? double(space.height) : 255.0;
    most[i] = range / space.sigma[i] * lattice_scale(dim, i);
    above += most[i];
  }
  LatticeRange result;
  bool fits = above <= kLargest && double(space.height) * double(space.width) * (dim + 1) < kMostVertices;
  for (int j = 0; j < dim && fits; ++j) {
    if (j > 0) above -= most[j - 1];
    const double low = j > 0 ? -j * most[j - 1] / (dim + 1) : 0.0, high = above / (dim + 1);
    fits = low >= -kLargest;
    if (!fits) break;
    constexpr int kMargin = 4;  // rounding, the step back into the plane, vertices, neighbours
    result.low[j] = int(std::floor(low)) - kMargin;
    result.values[j] = int(std::ceil(high)) + kMargin - result.low[j] + 1;
  }
  if (!fits) throw std::invalid_argument("the sigmas are too small for an image of this size");
  return result;
}

}  // namespace wsss
