#include "permutohedral.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "common/isa.h"
#include "permutohedral_range.h"

namespace wsss {

WSSS_FOR_EACH_ISA(extern const LatticeKernels lattice_kernels;)

const LatticeKernels& lattice_kernels() { return WSSS_CHOOSE_ISA(lattice_kernels); }

namespace {

constexpr int kRemainderBits = 3, kRankBits = 3;
constexpr uint32_t kNone = 0xffffffffu;
constexpr int kTileTableBits = 15;  // at most 3/8 full

uint32_t place_in(uint64_t key, int bits) { return uint32_t((key * 0x9E3779B97F4A7C15ull) >> (64 - bits)); }

// Numbers a tile's points in the order they come up.
class TilePoints {
 public:
  explicit TilePoints(uint16_t* table) : table_(table) {}
  void start(uint64_t* keys) {
    keys_ = keys;
    count_ = 0;
    std::memset(table_, 0, sizeof(uint16_t) << kTileTableBits);
  }
  uint16_t number(uint64_t key) {
    for (uint32_t at = place_in(key, kTileTableBits);; at = (at + 1) & ((1u << kTileTableBits) - 1)) {
      const uint16_t found = table_[at];  // number + 1
      if (found == 0) {
        keys_[count_++] = key;
        table_[at] = uint16_t(count_);
        return uint16_t(count_ - 1);
      }
      if (keys_[found - 1] == key) return uint16_t(found - 1);
    }
  }
  uint32_t count() const { return count_; }

 private:
  uint16_t* table_;
  uint64_t* keys_ = nullptr;
  uint32_t count_ = 0;
};

}  // namespace

std::vector<LatticeTile> lattice_tiles(int64_t height, int64_t width) {
  std::vector<LatticeTile> tiles;
  int64_t first = 0;
  for (int64_t y = 0; y < height; y += kLatticeTileRows) {
    for (int64_t x = 0; x < width; x += kLatticeTileColumns) {
      const int64_t y_end = std::min(y + kLatticeTileRows, height), x_end = std::min(x + kLatticeTileColumns, width);
      tiles.push_back({int(y), int(y_end), int(x), int(x_end), first});
      first += (y_end - y) * (x_end - x);
    }
  }
  return tiles;
}

Lattice::Lattice(const LatticeSpace& space, const std::vector<LatticeTile>& tiles)
    : space_(space),
      tiles_(tiles),
      vertices_(space.dim + 1),
      weights_(size_t(space.height) * space.width * vertices_),
      local_(size_t(space.height) * space.width * vertices_),
      tile_row_(tiles.size() + 1),
      tile_keys_(size_t(space.height) * space.width * vertices_) {
  const LatticeRange range = lattice_range(space);
  int shift = kRemainderBits;
  for (int i = 0; i < space.dim; ++i) {
    keys_.low[i] = range.low[i];
    keys_.shift[i] = shift;
    unit_[i] = uint64_t(1) << shift;
    while ((1 << (shift - keys_.shift[i])) < range.values[i]) ++shift;
    if (shift > 62) throw std::invalid_argument("the sigmas are too small for an image of this size");
  }
  unit_[space.dim] = 0;
}

void Lattice::build(const float* image, bool normalized, int threads) {
  find_simplices(image, threads);
  number_points();
  list_rows();
  view_.vertices = vertices_;
  view_.weights = weights_.get();
  view_.local = local_.get();
  view_.points = points_.get();
  view_.tile_row = tile_row_.data();
  view_.row_of = row_of_.get();
  view_.first_of = first_of_.get();
  view_.alpha = 1.0f / (1.0f + std::ldexp(1.0f, -space_.dim));
  const uint32_t count = view_.point_count;
  chains_ = Buffer<uint32_t>(size_t(count) * vertices_);
  const Buffer<uint32_t> lower(size_t(count) * vertices_);
  const Buffer<uint8_t> marks(size_t(count) * vertices_);
  const Buffer<float> rows(normalized ? view_.rows : 0), values(normalized ? count : 0);
  parallel(threads, [&](const Team& team) {
    find_neighbours(team, lower.get());
    team.barrier();
    link_chains(team, lower.get(), marks.get());
    if (normalized) normalize(team, rows.get(), values.get());
  });
}

// Weights, and the tiles' own numbers of the points.
void Lattice::find_simplices(const float* image, int threads) {
  const int dim = space_.dim;
  const Buffer<uint16_t> tables(size_t(threads) << kTileTableBits);
  parallel(threads, [&](const Team& team) {
    TilePoints points(tables.get() + (size_t(team.thread) << kTileTableBits));
    SimplexRow row;
    uint64_t keys[kLatticeTileColumns];    // of the row above: the remainder-0 vertex
    uint32_t orders[kLatticeTileColumns];  // and the ranks, in one number
    for (int64_t t = team.begin(int64_t(tiles_.size())); t < team.end(int64_t(tiles_.size())); ++t) {
      const LatticeTile& tile = tiles_[t];
      const int width = tile.x_end - tile.x_begin;
      points.start(tile_keys_.get() + size_t(tile.first) * vertices_);
      for (int y = tile.y_begin; y < tile.y_end; ++y) {
        const size_t at = size_t(tile.first) + size_t(y - tile.y_begin) * width;
        float* weights = weights_.get() + at * vertices_;
        uint16_t* local = local_.get() + at * vertices_;
        lattice_kernels().simplices(space_, tile, y, image, row);
        for (int x = 0; x < width; ++x, weights += vertices_, local += vertices_) {
          uint64_t key = 0;
          uint32_t order = 0;
          for (int i = 0; i <= dim; ++i) {
            weights[i] = row.weight[i][x];
            if (i < dim) key += uint64_t(row.q[i][x] - keys_.low[i]) << keys_.shift[i];
            order |= uint32_t(row.rank[i][x]) << (kRankBits * i);
          }
          const uint16_t* same = nullptr;
          if (x > 0 && keys[x - 1] == key && orders[x - 1] == order) {
            same = local - vertices_;
          } else if (y > tile.y_begin && keys[x] == key && orders[x] == order) {
            same = local - size_t(width) * vertices_;
          }
          keys[x] = key;
          orders[x] = order;
          if (same) {
            std::memcpy(local, same, sizeof(uint16_t) * vertices_);
            continue;
          }
          // Vertex k is vertex k - 1 one remainder on, but for the coordinate next in line, whose q falls by 1.
          uint64_t unit[kMaxLatticeVertices];
          for (int i = 0; i <= dim; ++i) unit[dim - row.rank[i][x]] = unit_[i];
          local[0] = points.number(key);
          for (int k = 1; k <= dim; ++k) {
            key += 1 - unit[k - 1];
            local[k] = points.number(key);
          }
        }
      }
      tile_row_[t + 1] = points.count();
    }
  });
}

// Numbers the points of all tiles in the order they come up, tile after tile.
void Lattice::number_points() {
  tile_row_[0] = 0;
  for (size_t t = 0; t < tiles_.size(); ++t) tile_row_[t + 1] += tile_row_[t];
  const uint32_t rows = tile_row_.back();
  for (table_bits_ = 8; (uint64_t(1) << table_bits_) < 2 * uint64_t(rows);) ++table_bits_;
  points_ = Buffer<uint32_t>(rows);
  point_keys_ = Buffer<uint64_t>(rows);
  table_ = Buffer<uint32_t>(size_t(1) << table_bits_);
  std::memset(table_.get(), 0xff, sizeof(uint32_t) << table_bits_);
  uint32_t count = 0, row = 0;
  const uint32_t mask = uint32_t((uint64_t(1) << table_bits_) - 1);
  for (size_t t = 0; t < tiles_.size(); ++t) {
    const uint64_t* key = tile_keys_.get() + size_t(tiles_[t].first) * vertices_;
    for (; row < tile_row_[t + 1]; ++row, ++key) {
      uint32_t at = place_in(*key, table_bits_);
      while (table_.get()[at] != kNone && point_keys_.get()[table_.get()[at]] != *key) at = (at + 1) & mask;
      uint32_t& number = table_.get()[at];
      if (number == kNone) {
        point_keys_.get()[count] = *key;
        number = count++;
      }
      points_.get()[row] = number;
    }
  }
  view_.rows = rows;
  view_.point_count = count;
}

uint32_t Lattice::find(uint64_t key) const {
  const uint32_t mask = uint32_t((uint64_t(1) << table_bits_) - 1);
  for (uint32_t at = place_in(key, table_bits_);; at = (at + 1) & mask) {
    const uint32_t number = table_.get()[at];
    if (number == kNone || point_keys_.get()[number] == key) return number;
  }
}

// The rows of each point.
void Lattice::list_rows() {
  const uint32_t count = view_.point_count, rows = view_.rows;
  first_of_ = Buffer<uint32_t>(count + 2);
  row_of_ = Buffer<uint32_t>(rows);
  uint32_t* const next = first_of_.get() + 1;  // where the next row of a point goes; in the end, where it stops
  std::memset(first_of_.get(), 0, (size_t(count) + 2) * sizeof(uint32_t));
  const uint32_t* const points = points_.get();
  for (uint32_t row = 0; row < rows; ++row) ++next[points[row] + 1];
  for (uint32_t p = 0; p < count; ++p) next[p + 1] += next[p];
  for (uint32_t row = 0; row < rows; ++row) row_of_.get()[next[points[row]]++] = row;
}

// Of every point along every axis the neighbour one lower in every coordinate but that of the axis. The other one's
// link is this, reversed.
void Lattice::find_neighbours(const Team& team, uint32_t* lower) const {
  const uint32_t count = view_.point_count;
  const int dim = space_.dim;
  uint64_t every = 0;
  for (int i = 0; i < dim; ++i) every += unit_[i];
  for (int64_t p = team.begin(count); p < team.end(count); ++p) {
    const uint64_t key = point_keys_.get()[p];
    const bool wraps = (key & ((1u << kRemainderBits) - 1)) == 0;
    const uint64_t below = wraps ? key + uint64_t(dim) - every : key - 1;
    for (int axis = 0; axis <= dim; ++axis) lower[size_t(axis) * count + p] = find(below + unit_[axis]);
  }
}

void Lattice::link_chains(const Team& team, const uint32_t* lower, uint8_t* marks) {
  const uint32_t count = view_.point_count;
  for (int64_t axis = team.begin(vertices_); axis < team.end(vertices_); ++axis) {
    const uint32_t* const next = lower + size_t(axis) * count;
    uint8_t* const has_upper = marks + size_t(axis) * count;
    std::memset(has_upper, 0, count);
    for (uint32_t p = 0; p < count; ++p) {
      if (next[p] != kNone) has_upper[next[p]] = 1;
    }
    uint32_t* const chain = chains_.get() + size_t(axis) * count;
    uint32_t size = 0;
    for (uint32_t p = 0; p < count; ++p) {
      if (has_upper[p] || next[p] == kNone) continue;
      for (uint32_t q = p; q != kNone; q = next[q]) chain[size++] = q;
      chain[size - 1] |= kChainEnd;
    }
    view_.chain[axis] = chain;
    view_.chain_size[axis] = size;
  }
}

// The weights become weight / sqrt(filter of ones + 1e-20).
void Lattice::normalize(const Team& team, float* rows, float* values) {
  const int64_t tiles = int64_t(tiles_.size());
  for (int64_t t = team.begin(tiles); t < team.end(tiles); ++t) {
    float* const own = rows + tile_row_[t];
    std::memset(own, 0, (tile_row_[t + 1] - tile_row_[t]) * sizeof(float));
    const size_t begin = size_t(tiles_[t].first) * vertices_;
    const size_t end = begin + size_t(tile_pixels(tiles_[t])) * vertices_;
    for (size_t i = begin; i < end; ++i) own[local_.get()[i]] += weights_.get()[i];
  }
  team.barrier();
  for (int64_t p = team.begin(view_.point_count); p < team.end(view_.point_count); ++p) {
    float sum = 0;
    for (uint32_t i = view_.first_of[p]; i < view_.first_of[p + 1]; ++i) sum += rows[view_.row_of[i]];
    values[p] = sum;
  }
  for (int axis = 0; axis < vertices_; ++axis) {
    team.barrier();
    const uint32_t* const chain = view_.chain[axis];
    const ChainRange range = chain_range(team, chain, view_.chain_size[axis]);
    float before = 0;
    for (uint32_t i = range.begin; i < range.end; ++i) {
      float& value = values[chain[i] & ~kChainEnd];
      const float old = value, after = chain[i] & kChainEnd ? 0 : values[chain[i + 1] & ~kChainEnd];
      value = old + 0.5f * (before + after);
      before = chain[i] & kChainEnd ? 0 : old;
    }
  }
  team.barrier();
  for (int64_t t = team.begin(tiles); t < team.end(tiles); ++t) {
    const uint32_t* const points = points_.get() + tile_row_[t];
    size_t i = size_t(tiles_[t].first) * vertices_;
    for (int64_t pixel = 0; pixel < tile_pixels(tiles_[t]); ++pixel, i += vertices_) {
      float sum = 0;
      for (int k = 0; k < vertices_; ++k) sum += weights_.get()[i + k] * values[points[local_.get()[i + k]]];
      const float norm = 1 / std::sqrt(view_.alpha * sum + 1e-20f);
      for (int k = 0; k < vertices_; ++k) weights_.get()[i + k] *= norm;
    }
  }
}

}  // namespace wsss
