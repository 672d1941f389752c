// The permutohedral lattice on the GPU, with the meaning of permutohedral.h.
//
// Everything a pixel touches is sorted: the vertices of all simplices, as (number of the point, pixel), by a stable
// radix sort. Equal numbers side by side are a point and its list of pixels, in the order of the pixels, so that
// splatting is a sum in one order and no two threads write one value. Sorting rather than hashing: it takes as many
// passes over 12 bytes a vertex as the numbers have bytes (3 for the usual sigmas), where a hash table would still
// leave the lists to be put in order, and what it gives is the same in every run.
//
// How many points there are is known to the device alone: memory is for as many as there could be, and kernels read the
// count.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "common/workspace.h"
#include "permutohedral_kernels.h"

namespace wsss {

constexpr int kLatticeThreads = 256;  // a block's
constexpr uint32_t kCut = 64;         // vertices of a list that one thread sums up

struct alignas(8) LatticeLink {
  uint32_t at;  // of a pixel's vertex: the point; of a point's list: the pixel
  float weight;
};

struct alignas(8) LatticeNeighbours {
  uint32_t lower, upper;  // kNoPoint: none
};
constexpr uint32_t kNoPoint = 0xffffffffu;

// A point's number is the sum of (q_i - low_i) unit_i (permutohedral_range.h); its remainder and its image come from
// the place among the entries of any vertex of it.
struct CudaLattice {
  int vertices;  // of a simplex: dim + 1
  int images;    // with points of their own
  int copies;    // images that share these points, with values of their own
  int width;
  float sigma[kMaxLatticeDim], scale[kMaxLatticeDim];
  int low[kMaxLatticeDim];
  uint64_t unit[kMaxLatticeVertices];  // adds 1 to q_i in a number; 0 for the implied coordinate
  uint64_t every;                      // all of them
  int digits;                          // of 8 bits, that a number has
  uint32_t plane;                      // pixels of an image
  uint32_t pixels;                     // plane x images
  uint32_t entries;                    // vertices of all pixels: number k of pixel p is entry k pixels + p
  uint32_t tiles, cuts;                // of the sorted entries: for the sort; every kCut of them
  uint32_t capacity;                   // points there may be
  float alpha;                         // of the slice
  const float* image;                  // [images, 3, H, W] for dim = 5
  LatticeLink *links, *lists;          // [pixels][vertices];  [entries] the lists, point after point
  uint64_t* numbers[2];                // [entries] being sorted; without the remainder, which the entry tells
  uint32_t* order[2];                  // [entries]
  uint32_t *counts, *totals;           // [256][tiles];  [256], later totals[0] is the number of points
  uint32_t *first, *point_of_cut;      // [capacity + 1] where lists begin;  [cuts]
  uint64_t* point_numbers;             // [capacity]
  uint32_t* segments;                  // [capacity] remainder x images + image
  LatticeNeighbours* neighbours;       // [vertices][capacity]
  float* norms;                        // [pixels]
  float *values[2], *cut_values;       // rows [copies][capacity], twice, from one to the other;  [copies][cuts]
};

// At most two, side by side in every launch.
struct CudaLattices {
  CudaLattice each[2];
  int count;
};

// Rows of values: columns of four labels each, 2^lane_bits threads for a row.
struct LatticeRows {
  int columns, lane_bits;
};
LatticeRows lattice_rows(int64_t labels);

// Room for a lattice and its values, taken from the workspace; images x copies x pixels x vertices < 2^31.
// std::invalid_argument where the sigmas are too small.
CudaLattice plan_lattice(const LatticeSpace& space, int64_t images, int64_t copies, LatticeRows rows,
                         Workspace& workspace);

// normalized: the weights are divided by sqrt(filter of ones + 1e-20).
void build_lattices(const CudaLattices& lattices, bool normalized, cudaStream_t stream);

// pixels: rows [copies x pixels], null for ones. Leaves the points' values, before the slice.
void filter_lattices(const CudaLattices& lattices, LatticeRows rows, const float4* pixels, cudaStream_t stream);

// Blocks for work that so many threads could share, each coming back for more.
unsigned lattice_blocks(double threads);

}  // namespace wsss
