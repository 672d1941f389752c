// The parts of pixel_adaptive.cpp that are compiled once for each instruction set. A row is cut into blocks of `lanes`
// pixels; the weights of a block stand side by side, [neighbour, lane].
#pragma once
#include <cstddef>
#include <cstdint>

#include "pixel_adaptive.h"

namespace wsss {

inline constexpr int kMaxTaps = 8 * kMaxDilations;

// A row of weights from rows of the picture, all of which can be read `lanes` columns past the width.
struct WeightRow {
  const float* centre[3];
  const float* const* taps;  // [3, neighbours]
  const float* position;     // [neighbours] what is added to the softmax, or null: PAMR
  int neighbours, blocks;
  uint16_t* weights;  // [blocks, neighbours, lanes]
  float* factors;     // [blocks * lanes] by which a sum of weighted values is to be multiplied
};

// The sums of a row for several maps.
struct SmoothRow {
  const uint16_t* weights;   // of the first block
  const float* factors;      // of the first block
  const float* const* taps;  // [neighbours] of the first map, at the first block
  ptrdiff_t map_stride;      // between maps of a tap
  int neighbours, blocks, maps, pixels;
  float* out;            // of the first map, at the first block
  ptrdiff_t out_stride;  // between maps
};

// The transpose: what a row of the gradient adds to its neighbours.
struct SpreadRow {
  const uint16_t* weights;
  const float* factors;
  const float* grad;  // of the first map
  ptrdiff_t grad_stride;
  float* const* taps;  // [neighbours] of the first map
  ptrdiff_t map_stride;
  int neighbours, blocks, maps, pixels;
};

struct AdaptiveKernels {
  int lanes;
  void (*weigh)(const WeightRow& row);
  void (*smooth)(const SmoothRow& row);
  void (*spread)(const SpreadRow& row);
};

}  // namespace wsss
