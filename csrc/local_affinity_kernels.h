// The affinity's inner loops, one table per instruction set; local_affinity.cpp cuts the maps into tiles.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/neighbourhood.h"
#include "local_affinity.h"

namespace wsss {

constexpr int kTileColumns = 128;  // pixels
constexpr int kTileRows = 24;
constexpr int kForwardChannels =
    16;  // packed together; two rows of them stay in the first-level cache, a tile in the second
constexpr int kBackwardChannels = 8;
constexpr int kLineMargin = 16;  // >= any reach and any vector, on both sides of a packed line
constexpr int kLine = kTileColumns + 2 * kLineMargin;
static_assert(kLineMargin >= kMaxRadius - 1);

struct AffinityTile {
  int y_begin, y_end, x_begin, x_end;
};

struct AffinityProblem {
  int dim, height, width;
  AffinityOptions options;
  const Neighbourhood* hood;
};

inline constexpr size_t kForwardPack = size_t(kTileRows + kMaxRadius) * kForwardChannels * kLine;
inline constexpr size_t kBackwardPack = size_t(kTileRows + 2 * kMaxRadius) * kBackwardChannels * kLine;

// Pair weights of one image for the backward pass: rows of `pair_line` values with margins of zeros all round.
static inline size_t pair_line(int width) { return (size_t(width) + 15) / 16 * 16 + 2 * kLineMargin; }
static inline size_t pair_plane(const AffinityProblem& problem) {
  return pair_line(problem.width) * size_t(problem.height + problem.hood->radius - 1);
}

struct AffinityKernels {
  // 1 / |f| of every pixel in rows [begin, end), 0 for a zero vector.
  void (*inverse_norms)(const AffinityProblem&, const float* feats, float* norms, int begin, int end);
  // out over a tile; with the automatic scale the bare distances, whose sums by row go to row_sums[y - y_begin].
  // sums: at least K * kTileRows * kTileColumns values.
  void (*forward_tile)(const AffinityProblem&, const AffinityTile&, const float* feats, const float* norms, float* out,
                       double* row_sums, float* packed, float* sums);
  // distances -> affinities, row y.
  void (*apply_scale)(const AffinityProblem&, float* out, float scale, int y);
  // Row y of the pair weights h, such that grad_i = sum of h times sign(f_i - f_j) (l1) or f_j / |f_j| (cosine).
  void (*pair_weights)(const AffinityProblem&, const float* grad, const float* affinity, float scale, float* pairs,
                       int y);
  void (*backward_tile)(const AffinityProblem&, const AffinityTile&, const float* feats, const float* norms,
                        const float* pairs, float* grad_feats, float* packed);
};

}  // namespace wsss
