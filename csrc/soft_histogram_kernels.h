// The parts of soft_histogram.cpp that are compiled once for each instruction set. A tile is `tile` pixels wide, word
// or feature by row; `vectors` of its vectors of `lanes` pixels hold anything.
#pragma once
#include <cstddef>
#include <cstdint>

namespace wsss {

inline constexpr int kHistogramDepth =
    128;  // rows of a tile that a product takes at once: they stay in the first cache

struct NextRows {  // what will be read next, to be fetched meanwhile
  const float* begin;
  ptrdiff_t stride;
  int rows;
};

// A tile of scores and what belongs to its pixels, [tile] each.
struct ScoreTile {
  float* scores;  // [words, tile]
  int words, vectors;
  float temperature;
  const float* inverse_norm;
  float* log_sum;
};

struct HistogramKernels {
  int lanes;
  int tile;         // pixels
  int panel;        // rows of a factor that lie side by side, [depth, panel]
  int block;        // words side by side in the factor of `reduce`, at most
  int reduce_rows;  // rows of features `reduce` takes at once
  // tile[k] = feats[k * stride], zeros behind `pixels`; squares[tile] += their squares.
  void (*load)(const float* feats, ptrdiff_t stride, int rows, int pixels, float* tile, float* squares);
  // out[panels * panel, tile] = (first) or += panels[.., depth, panel] times tile[depth, tile].
  void (*multiply)(const float* panels, int count, const float* tile, int depth, int vectors, float* out, bool first,
                   const NextRows& next);
  // Products in scores -> softmax numerators; log_sum, assignment; bins[words] = sums over the first `pixels`.
  void (*softmax)(const ScoreTile& tile, int pixels, int32_t* assignment, float* bins);
  // Products in scores -> gradient of the cosines; along[tile] = their sum over words weighted by the cosine.
  void (*slope)(const ScoreTile& tile, const float* grad, float* along);
  // out[blocks, span, block] at the tile's first pixel = (scores * inverse_norm) transposed; rows a multiple of lanes.
  void (*transpose)(const ScoreTile& tile, int rows, int span, float* out);
  // out[rows, stride] += feats[rows, pixels] times factor[pixels, vectors * lanes], rows <= reduce_rows.
  void (*reduce)(const float* feats, ptrdiff_t feats_stride, int rows, const float* factor, int factor_stride,
                 int vectors, int pixels, float* out, ptrdiff_t out_stride);
  // grad[k] = products[k] * scale - feats[k] * pull, over `pixels`.
  void (*settle)(const float* products, const float* feats, float* grad, ptrdiff_t stride, int rows, int pixels,
                 const float* scale, const float* pull);
};

}  // namespace wsss
