// The sums for any radius: a block has four segments of the stencil, one slice and one stage.
#pragma once
#include "local_affinity_sums.cuh"

namespace wsss::any_radius {
namespace {

constexpr int kSlots = kGroups * kSegmentTaps;  // neighbours of a block

constexpr int kDepth = 2;
constexpr int kSummed = 32;
constexpr int kLaneColumns = 2;  // of a staged row
static_assert(kSummed % kDepth == 0);

// Quads of the margin on either side.
__host__ __device__ inline int margin_quads(int radius) { return (radius - 1 + kQuad - 1) / kQuad; }

// Floats of a staged row: 16 modulo 32 banks.
__host__ __device__ inline int row_pitch(int radius) {
  return (kTileColumns + 2 * margin_quads(radius) * kQuad + 15) / 32 * 32 + 16;
}

inline size_t shared_floats(int radius) {
  return size_t(kDepth) * (kTileRows + radius - 1) * row_pitch(radius) + kSlots * kTilePixels;
}

// Rows of a channel, a warp each; `lane_at`: where a lane's values of a row go.
template <class T, bool kCosine>
__device__ inline void stage_channel(const AffinitySums& p, const Tile& tile, int channel, int rows, int pitch,
                                     const int (&lane_at)[kLaneColumns], float* patch) {
  const int x = tile.x + int(threadIdx.x) % kWarp - margin_quads(p.radius) * kQuad;
  const int64_t pixel = int64_t(tile.y) * p.width + x;
  const T* const feats = static_cast<const T*>(p.feats) + (tile.image * p.dim + channel) * p.plane + pixel;
  const float* const norms = kCosine ? p.norms + tile.image * p.plane + pixel : nullptr;
  for (int row = threadIdx.x / kWarp; row < rows; row += kGroups) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const bool there = tile.y + row < p.height && x + i * kWarp >= 0 && x + i * kWarp < p.width;
      const int at = row * p.width + i * kWarp;
      float value = there && lane_at[i] >= 0 ? to_float(feats[at]) : 0.0f;
      if (kCosine && there && lane_at[i] >= 0) value *= norms[at];
      if (lane_at[i] >= 0) patch[row * pitch + lane_at[i]] = value;
    }
  }
}

template <class T, bool kCosine>
__global__ void __launch_bounds__(kSliceThreads, 3) sums_kernel(const AffinitySums p) {
  const int group = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Tile tile = tile_of(p);
  const int sets = (p.segments + kGroups - 1) / kGroups, set = int(blockIdx.y) % sets, split = int(blockIdx.y) / sets;
  const int first = split * p.channels, end = min(first + p.channels, p.dim);
  const int pitch = row_pitch(p.radius), margin = margin_quads(p.radius);
  const int last_segment = min(set * kGroups + kGroups, p.segments) - 1;
  const int rows = kTileRows + p.segment[last_segment].dy;  // segments come by rows
  const Segment segment = p.segment[min(set * kGroups + group, last_segment)];

  const int quad = lane % (kTileColumns / kPixels) * 2 + margin, other = quad + segment.first_dx / kQuad;
  const int last_quad = kTileColumns / kQuad + 2 * margin - 1;  // what lies beyond is for no neighbour
  const int row = lane / (kTileColumns / kPixels) * pitch;
  int centre_at[2], window_at[4], lane_at[kLaneColumns];
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const int column = lane + i * kWarp;
    lane_at[i] = column / kQuad <= last_quad ? quad_at(column / kQuad, pitch) + column % kQuad : -1;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) centre_at[i] = row + quad_at(quad + i, pitch);
#pragma unroll
  for (int i = 0; i < 4; ++i) window_at[i] = row + segment.dy * pitch + quad_at(min(other + i, last_quad), pitch);

  float* const patches = block_memory<float>();
  const int patch_size = (kTileRows + p.radius - 1) * pitch;
  float* const totals = patches + kDepth * patch_size;
  float sum[kSegmentTaps][kPixels] = {};
  bool joined = false;
  for (int channel = first; channel < end; channel += kDepth) {
    const int depth = min(kDepth, end - channel);
    for (int d = 0; d < depth; ++d) {
      stage_channel<T, kCosine>(p, tile, channel + d, rows, pitch, lane_at, patches + d * patch_size);
    }
    __syncthreads();
#pragma unroll 1
    for (int d = 0; d < depth; ++d) {
      const float* const patch = patches + d * patch_size;
      float centre[kPixels], window[kWindow];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_quad(centre + i * kQuad, patch + centre_at[i]);
#pragma unroll
      for (int i = 0; i < 4; ++i) load_quad(window + i * kQuad, patch + window_at[i]);
      add_pairs<kCosine, 0, kSegmentTaps, 0, 0>(sum, centre, window);
    }
    if ((channel - first) % kSummed == kSummed - kDepth || channel + kDepth >= end) {
#pragma unroll
      for (int tap = 0; tap < kSegmentTaps; ++tap) {
        join_totals(totals, group * kSegmentTaps + tap, lane, !joined, sum[tap]);
#pragma unroll
        for (int i = 0; i < kPixels; ++i) sum[tap][i] = 0;
      }
      joined = true;
    }
    __syncthreads();
  }
  write_totals<T>(p, totals, kSlots, tile, split, [&](int slot) {
    const int index = set * kGroups + slot / kSegmentTaps, tap = slot % kSegmentTaps;
    if (index >= p.segments) return -1;
    const Segment s = p.segment[index];
    const int dx = s.first_dx + tap;
    const bool neighbour = dx * dx + s.dy * s.dy < p.radius * p.radius && (s.dy > 0 || dx > 0);
    return neighbour ? s.first_k + tap : -1;
  });
}

}  // namespace
}  // namespace wsss::any_radius
