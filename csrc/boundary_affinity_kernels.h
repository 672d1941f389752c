// The inner loops of the affinity across boundaries, one table per instruction set; boundary_affinity.cpp cuts the maps
// into bands of rows.
#pragma once
#include <cstddef>
#include <cstdint>

#include "boundary_paths.h"
#include "common/neighbourhood.h"

namespace wsss {

constexpr int kBandRows = 8;         // the same for any number of threads: it decides the order of sums
constexpr int kBoundaryMargin = 16;  // >= any reach and any vector, on both sides of a line
static_assert(kBoundaryMargin >= kMaxRadius - 1);

// Less than sqrt(2) radius + 1 values of |dy| + |dx|, and no more than two points of a path share one: next to each
// other they are at least a pixel apart across the line, and all lie less than a pixel to either side of it.
constexpr int kMaxPathDepth = 3 * kMaxRadius;

// Gradients of some columns of a row by point: lines of values, zero in the margins.
constexpr int kPointColumns = 128;
constexpr int kPointMargin = 2 * kBoundaryMargin;
constexpr int kPointLine = kPointColumns + 2 * kPointMargin;

struct BoundaryProblem {
  int height, width, radius;
  ptrdiff_t plane;
  bool stream;  // past the caches: every row of the result begins on a cache line, and they could not hold it
  const Neighbourhood* hood;
  const PathTree* tree;  // for rows of boundary_line values
};

static inline ptrdiff_t boundary_line(int64_t width) { return (width + 15) / 16 * 16 + 2 * kBoundaryMargin; }

struct BoundaryKernels {
  // Rows [y, y_end) of an image as integers in the same order, NaN above all, -0 and 0 the same; zeros all round: so
  // far as paths from those rows reach, radius - 1 rows below y_end.
  void (*pack)(const BoundaryProblem&, const float* boundary, int32_t* keys, int y, int y_end);
  // The result [K, H, W] in rows [y, y_end); keys points to the first of them packed.
  void (*forward)(const BoundaryProblem&, const int32_t* keys, int y, int y_end, float* out);
  // Adds the gradient's share of the pairs that begin in those rows to sums, rows of boundary_line values whose first
  // is y. points: as many lines of kPointLine values as the tree has points, all zero, and left so.
  void (*backward)(const BoundaryProblem&, const int32_t* keys, int y, int y_end, const float* grad, float* points,
                   float* sums);
  // to = 0 - the sum of `count` rows, in their order.
  void (*subtract_rows)(float* to, const float* const* rows, int count, int width);
};

}  // namespace wsss
