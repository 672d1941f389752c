// The permutohedral lattice (Adams, Baek and Davis 2010): a Gaussian filter over the feature vectors of pixels.
// A vector lies in a simplex of dim + 1 lattice points. Splat: its values go to them by barycentric weights. Blur:
// along each of the dim + 1 axes in turn, new = old + (n1 + n2) / 2, where a point nobody touched counts as 0. Slice:
// back.
//
// The image is cut into tiles. What a tile touches is numbered within the tile, in rows of its own: it splats into
// those without meeting another thread, and each point then sums its rows in the order of the tiles.
#pragma once
#include <cstdint>
#include <vector>

#include "common/buffer.h"
#include "common/parallel.h"
#include "permutohedral_kernels.h"

namespace wsss {

std::vector<LatticeTile> lattice_tiles(int64_t height, int64_t width);

// A thread's share of the chains of an axis, cut between two of them.
inline ChainRange chain_range(const Team& team, const uint32_t* chain, uint32_t size) {
  const auto cut = [&](int64_t at) {
    while (at > 0 && at < int64_t(size) && !(chain[at - 1] & kChainEnd)) ++at;
    return uint32_t(at);
  };
  return {cut(team.begin(size)), cut(team.end(size))};
}

// A lattice point as one number: coordinate i is (dim + 1) q_i + remainder for every i < dim (the last is implied);
// q_i - low_i from bit shift_i up, the remainder in the lowest bits.
struct LatticeKeys {
  int low[kMaxLatticeDim];
  int shift[kMaxLatticeDim];
};

class Lattice {
 public:
  // std::invalid_argument where the sigmas are so small that the points cannot be numbered.
  Lattice(const LatticeSpace& space, const std::vector<LatticeTile>& tiles);

  // image: [3, H, W] for dim = 5, otherwise unused. normalized: the weights are divided by sqrt(filter of ones +
  // 1e-20), so that the filter is normalised on both sides.
  void build(const float* image, bool normalized, int threads);

  const LatticeView& view() const { return view_; }

 private:
  void find_simplices(const float* image, int threads);
  void number_points();
  void list_rows();
  void find_neighbours(const Team& team, uint32_t* lower) const;
  void link_chains(const Team& team, const uint32_t* lower, uint8_t* marks);
  void normalize(const Team& team, float* rows, float* values);
  uint32_t find(uint64_t key) const;

  LatticeSpace space_;
  const std::vector<LatticeTile>& tiles_;
  LatticeKeys keys_;
  uint64_t unit_[kMaxLatticeVertices];  // adds 1 to q_i; 0 for the implied coordinate
  int vertices_;
  Buffer<float> weights_;
  Buffer<uint16_t> local_;
  std::vector<uint32_t> tile_row_;
  Buffer<uint64_t> tile_keys_;  // of a tile's points, from vertices * first on
  Buffer<uint32_t> points_{0}, row_of_{0}, first_of_{0}, table_{0};
  Buffer<uint32_t> chains_{0};
  Buffer<uint64_t> point_keys_{0};
  int table_bits_ = 0;
  LatticeView view_{};
};

}  // namespace wsss
