// The loss's inner loops, one table per instruction set; affinity_loss.cpp prepares the labels.
#pragma once
#include <cstddef>
#include <cstdint>

#include "affinity_loss.h"
#include "common/neighbourhood.h"

namespace wsss {

constexpr int kCodeMargin = 16;  // >= any reach and any vector, on both sides of a line of codes
static_assert(kCodeMargin >= kMaxRadius - 1);

static inline size_t code_line(int64_t width) { return (size_t(width) + 15) / 16 * 16 + 2 * kCodeMargin; }

// Row y of one image. Codes are labels with -1 for what makes no pair: ignored, outside the map.
struct LossRow {
  const Neighbourhood* hood;
  int width;
  size_t plane;            // pixels between two neighbours' affinities
  const float* affinity;   // of neighbour 0
  const int32_t* sources;  // [W] and margins; -1 also for what is no source
  const int32_t* codes;    // [W] and margins; the rows below follow, code_line(width) apart
};

struct LossKernels {
  // Sums of the pairs' costs, and their numbers, by class.
  void (*sums)(const LossRow&, double* sums, double* counts);
  // weights [3]: grad_affinity = -+ weight / the logarithm's argument.
  void (*gradient)(const LossRow&, const float* weights, float* grad_affinity);
};

}  // namespace wsss
