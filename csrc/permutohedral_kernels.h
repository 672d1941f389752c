// The lattice's inner loops, one table per instruction set. Values lie in rows of `row` floats, one a label, the rest
// of a row padding: a row a pixel (in the order of tiles), a row a point, and the rows each tile splats into.
#pragma once
#include <cstddef>
#include <cstdint>

namespace wsss {

constexpr int kMaxLatticeDim = 5;
constexpr int kMaxLatticeVertices = kMaxLatticeDim + 1;
constexpr int kLatticeTileRows = 32, kLatticeTileColumns = 64;
constexpr int kLatticeTilePixels = kLatticeTileRows * kLatticeTileColumns;
static_assert(kLatticeTilePixels * kMaxLatticeVertices < 65535, "a tile's points are numbered in 16 bits");

struct LatticeTile {
  int y_begin, y_end, x_begin, x_end;
  int64_t first;  // place of its first pixel: tile after tile, row by row within a tile
};

// Features: x / sigma[0], y / sigma[1] and, where dim = 5, red, green and blue / sigma[2..4], taken into 0..255, NaN to
// 0.
struct LatticeSpace {
  int dim;  // 2 or 5
  int64_t height, width;
  float sigma[kMaxLatticeDim];
};

// The simplices of one row of a tile.
struct SimplexRow {
  alignas(64) float weight[kMaxLatticeVertices][kLatticeTileColumns];
  alignas(64) int32_t q[kMaxLatticeVertices][kLatticeTileColumns];     // of the remainder-0 vertex
  alignas(64) int32_t rank[kMaxLatticeVertices][kLatticeTileColumns];  // 0..dim, the largest offset has 0
};

constexpr uint32_t kChainEnd = 0x80000000u;

// What the kernels read. Rows and points are indices into tables of rows of values.
struct LatticeView {
  int vertices;
  const float* weights;      // [pixels in the order of tiles][vertices]
  const uint16_t* local;     // the same: which of the tile's rows
  const uint32_t* points;    // [rows] the point of each row
  const uint32_t* tile_row;  // [tiles + 1] first row of each tile
  const uint32_t* row_of;    // [rows] rows, point after point, each in the order of the tiles
  const uint32_t* first_of;  // [points + 1] where a point's rows begin in row_of
  // Points along each axis, chain after chain of neighbours, the last of a chain marked by kChainEnd; points without
  // neighbours are left out.
  const uint32_t* chain[kMaxLatticeVertices];
  uint32_t chain_size[kMaxLatticeVertices];
  uint32_t rows, point_count;
  float alpha;  // of the slice
};

struct ChainRange {
  uint32_t begin, end;
};

static inline int64_t tile_pixels(const LatticeTile& tile) {
  return int64_t(tile.y_end - tile.y_begin) * (tile.x_end - tile.x_begin);
}

// One lattice's part in a pass over a tile.
struct LatticeTerm {
  const LatticeView* lattice;
  const float* values;  // rows of the points
  float* rows;          // rows of the tiles
};

// e = own + sum over terms of their slice; q = softmax(e). The first pass slices nothing, the last splats nothing and
// leaves q where the energies were.
struct MeanFieldPass {
  LatticeTerm terms[2];
  int term_count;
  bool slices, splats;
  float* energies;  // rows of the pixels: -unary, -infinity in the padding
  int row;
};

struct LatticeKernels {
  // Row y of a tile; image [3, H, W] or null.
  void (*simplices)(const LatticeSpace&, const LatticeTile&, int y, const float* image, SimplexRow& out);
  int (*row_floats)(int64_t labels);
  // scratch: lattice_scratch(row) floats, of the thread.
  void (*mean_field)(const MeanFieldPass&, const LatticeTile&, int64_t tile, float* scratch);
  // values[p] = scale * sum of its rows, for points [begin, end).
  void (*combine)(const LatticeView&, const float* rows, float* values, int row, float scale, uint32_t begin,
                  uint32_t end);
  // In place, along one axis.
  void (*blur)(const uint32_t* chain, ChainRange range, float* values, int row);
  // The tile's rows get the tile's pixels; dim = 5.
  void (*splat)(const LatticeTerm&, const float* pixels, int row, const LatticeTile&, int64_t tile);
  // pixels become their slice; returns the sum of old times new value.
  double (*slice)(const LatticeTerm&, float* pixels, int row, const LatticeTile&, int64_t tile);
  // rows = scale * plane (* factor, a plane for all labels, where given), `padding` beyond the labels.
  void (*pack)(const float* planes, const float* factor, float scale, float padding, int64_t labels, int64_t height,
               int64_t width, const LatticeTile&, float* pixels, int row);
  // The reverse.
  void (*unpack)(const float* pixels, const float* factor, float scale, int64_t labels, int64_t height, int64_t width,
                 const LatticeTile&, float* planes, int row);
};

constexpr int kLatticeBatch = 32;  // pixels that go through a pass together
static inline size_t lattice_scratch(int row) { return size_t(kLatticeBatch) * (row + 1) + 64; }

const LatticeKernels& lattice_kernels();

}  // namespace wsss
