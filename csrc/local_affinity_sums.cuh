// The sums over channels of local_affinity: |f_i - f_j| or u_i u_j (u = f / |f|) for every pair.
//
// A block owns a tile of pixels. Its features, with a margin, pass through shared memory a few channels at a time. A
// thread owns eight neighbouring pixels of a row and up to nine neighbours of each: one stencil row's 16 values serve
// 72 sums in registers, so that the arithmetic and not shared memory sets the pace. Four warps have the stencil rows
// between them ("groups"); further sets of four take further channels ("slices"). Where there are few tiles, blocks
// share the channels of one ("splits").
#pragma once
#include "local_affinity_device.cuh"

namespace wsss {
namespace {

constexpr int kTileRows = 8;
constexpr int kTileColumns = 32;
constexpr int kTilePixels = kTileRows * kTileColumns;
constexpr int kWarp = 32;
constexpr int kGroups = 4;
constexpr int kSliceThreads = kGroups * kWarp;
constexpr int kMaxSlices = 3;         // 12 warps of 168 registers fill a processor
constexpr int kPixels = 8;            // of a thread, side by side
constexpr int kQuad = 4;              // values of one shared memory access
constexpr int kWindow = 2 * kPixels;  // columns from four to the left of a thread's pixels to four to the right
constexpr int kSegmentTaps = 8;       // of a thread, any radius
constexpr int kMaxSegments = 64;
static_assert(kTilePixels == kWarp * kPixels);

// How a sum becomes an affinity.
struct AffinityRule {
  bool cosine, cropped;
  int margin;   // where cropped: radius - 1
  float slope;  // l1: of the exponent
};

__device__ inline float affinity_of(const AffinityRule& rule, float sum) {
  if (!rule.cosine) return expf(sum * rule.slope);
  return sum < 0.0f ? 0.0f : sum > 1.0f ? 1.0f : sum;
}

struct Offsets {
  signed char dy[kMaxNeighbours], dx[kMaxNeighbours];
};

// Neighbours (dy, first_dx + 0 ... kSegmentTaps - 1), of which those outside the half disc are left out.
struct Segment {
  signed char dy, first_dx;
  short first_k;  // the index that first_dx would have
};

struct AffinitySums {
  const void* feats;
  const float* norms;  // cosine
  float* sums;         // [splits, B, K, H, W] the sums, or null: the affinities are written to out
  void* out;
  float* scale;  // [B] where it is not automatic
  int64_t batch, plane;
  int dim, height, width, radius, count;
  int tiles, tiles_across;  // of an image, of its width
  int channels;             // of a split, in whole stages
  int slices, splits;
  float used_scale;
  bool automatic;
  AffinityRule rule;
  Offsets offsets;
  int segments;  // any radius only, as is what follows
  Segment segment[kMaxSegments];
};

__device__ inline bool in_map(const AffinitySums& p, int y, int x, int k) {
  const int column = x + p.offsets.dx[k];
  return y + p.offsets.dy[k] < p.height && column >= 0 && column < p.width;
}

__device__ inline bool cropped_away(const AffinitySums& p, int y, int x) {
  const int margin = p.rule.margin;
  return p.rule.cropped && (y >= p.height - margin || x < margin || x >= p.width - margin);
}

// The block's place.
struct Tile {
  int64_t image;
  int y, x;
};

__device__ inline Tile tile_of(const AffinitySums& p) {
  const int tiles = p.tiles, image = int(blockIdx.x) / tiles, tile = int(blockIdx.x) % tiles;
  return {image, tile / p.tiles_across * kTileRows, tile % p.tiles_across * kTileColumns};
}

// A staged row keeps its even quads and its odd quads apart: the quads 2 t + i of the threads t of a warp then lie side
// by side, so that a 16-byte load meets no bank twice.
__device__ constexpr int quad_at(int quad, int pitch) { return quad / 2 * kQuad + (quad % 2 ? pitch / 2 : 0); }

// sum[tap][pixel] += pairs of pixel `pixel` and its neighbour kFirst + tap columns away; window[0] is column -kLeft of
// the first pixel.
template <bool kCosine, int kFirst, int kTaps, int kLeft, int kFrom, int kSums, int kColumns>
__device__ inline void add_pairs(float (&sum)[kSums][kPixels], const float (&centre)[kPixels],
                                 const float (&window)[kColumns]) {
  static_assert(kFrom + kTaps <= kSums && kFirst + kLeft >= 0 && kFirst + kLeft + kTaps + kPixels - 1 <= kColumns);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const float there = window[kLeft + kFirst + tap + i];
      float& to = sum[kFrom + tap][i];
      to = kCosine ? fmaf(centre[i], there, to) : to + fabsf(centre[i] - there);
    }
  }
}

__device__ inline void load_quad(float* to, const float* from) {
  const float4 quad = *reinterpret_cast<const float4*>(from);
  to[0] = quad.x;
  to[1] = quad.y;
  to[2] = quad.z;
  to[3] = quad.w;
}

// Adds a thread's sums of one neighbour to its totals, which no other thread touches until the block has met.
__device__ inline void join_totals(float* totals, int slot, int lane, bool first, const float (&sum)[kPixels]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float4* const at = reinterpret_cast<float4*>(totals + slot * kTilePixels) + half * kWarp + lane;
    const float* const from = sum + half * kQuad;
    const float4 before = first ? float4{} : *at;
    *at = {before.x + from[0], before.y + from[1], before.z + from[2], before.w + from[3]};
  }
}

// Adds up the slices of the totals in one order and writes them, a neighbour a warp. k_of(slot) < 0: no neighbour.
template <class T, class KOf>
__device__ inline void write_totals(const AffinitySums& p, const float* totals, int slots, const Tile& tile, int split,
                                    KOf k_of) {
  const int lane = threadIdx.x % kWarp, x = tile.x + lane, rows = min(kTileRows, p.height - tile.y);
  const int lane_at = (lane / kQuad % 2 * kWarp + lane / kPixels) * kQuad + lane % kQuad;
  for (int slot = threadIdx.x / kWarp; slot < slots; slot += p.slices * kGroups) {
    const int k = k_of(slot);
    if (k < 0 || x >= p.width) continue;
    const float* const from = totals + slot * kTilePixels + lane_at;
    const int64_t at = (tile.image * p.count + k) * p.plane + int64_t(tile.y) * p.width + x;
    float* const sums = p.sums ? p.sums + split * p.batch * p.count * p.plane + at : nullptr;
    T* const out = static_cast<T*>(p.out) + at;
    const bool linked = in_map(p, tile.y, x, k) && !cropped_away(p, tile.y, x);
    const int last = p.height - max(int(p.offsets.dy[k]), p.rule.cropped ? p.rule.margin : 0) - tile.y;
#pragma unroll
    for (int row = 0; row < kTileRows; ++row) {
      if (row >= rows) break;
      float sum = 0;
#pragma unroll
      for (int slice = 0; slice < kMaxSlices; ++slice) {
        if (slice < p.slices) sum += from[slice * slots * kTilePixels + row * kTileColumns / kPixels * kQuad];
      }
      if (sums) {
        sums[row * p.width] = sum;
      } else {
        store(out + row * p.width, linked && row < last ? affinity_of(p.rule, sum) : 0.0f);
      }
    }
  }
  if (!p.automatic && int(blockIdx.x) % p.tiles == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    p.scale[tile.image] = p.used_scale;
  }
}

}  // namespace
}  // namespace wsss
