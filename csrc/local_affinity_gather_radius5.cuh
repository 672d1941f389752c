// The gradient for radius 5. A block owns a tile of pixels, whose coefficients stand in shared memory; its warps take
// four channels at a time each and share nothing else. A thread owns four neighbouring pixels of a row: a stencil row's
// 12 values of a channel serve 36 links, its 36 coefficients four channels.
#pragma once
#include "local_affinity_gather.cuh"

namespace wsss::radius5 {
namespace {

constexpr int kReach = 4;
constexpr int kLinks = 2 * neighbour_count(kReach + 1);
constexpr int kPixels = 4;
constexpr int kChannels = 4;
constexpr int kTileRows = 4;
constexpr int kTileColumns = 32;
constexpr int kTilePixels = kTileRows * kTileColumns;
constexpr int kRows = kTileRows + 2 * kReach;
constexpr int kColumns = kTileColumns + 2 * kReach;
constexpr int kPatch = kRows * kColumns;
constexpr int kMaxWarps = 8;
static_assert(kTilePixels == kWarp * kPixels && kPatch % kWarp == 0 && kTilePixels <= kPatch);

constexpr int kOutside = -2147483647;

// A block's shared memory, in floats: coefficients [link, pixel], of the patch's places the offset from the tile's
// first pixel (or kOutside) and the norm, and each warp's patches.
constexpr int kPlacesAt = kLinks * kTilePixels;
constexpr int kNormsAt = kPlacesAt + kPatch;
constexpr int kPatchesAt = kNormsAt + kPatch;
constexpr size_t shared_floats(int warps) { return kPatchesAt + size_t(warps) * kChannels * kPatch; }

__device__ inline void load_quad(float* to, const float* from) {
  const float4 quad = *reinterpret_cast<const float4*>(from);
  to[0] = quad.x;
  to[1] = quad.y;
  to[2] = quad.z;
  to[3] = quad.w;
}

// The links of a pixel in the order of their ends, row by row: the backward ones come first and in the opposite order.
template <class T>
__device__ void load_coefficients(const Gather& g, int64_t image, int tile_y, int tile_x, float* coefficients) {
  const float slope = slope_of(g, image);
  const int threads = min(int(blockDim.x), kTilePixels);  // of a share of the links
  const int shares = blockDim.x / threads, share = threadIdx.x / threads;
  if (share >= shares) return;
  for (int pixel = threadIdx.x % threads; pixel < kTilePixels; pixel += threads) {
    const int y = tile_y + pixel / kTileColumns, x = tile_x + pixel % kTileColumns;
    const bool inside = y < g.height && x < g.width;
    const int64_t at = int64_t(y) * g.width + x;
    int k = 0;
    for (int dy = 0; dy <= kReach; ++dy) {
      const int reach = stencil_reach(kReach + 1, dy);
      for (int dx = dy == 0 ? 1 : -reach; dx <= reach; ++dx, ++k) {
        if (k % shares != share) continue;
        const int64_t link = k * g.plane + at;
        const bool from_there = inside && y - dy >= 0 && x - dx >= 0 && x - dx < g.width;
        coefficients[(kLinks / 2 + k) * kTilePixels + pixel] = inside ? coefficient<T>(g, image, slope, link) : 0.0f;
        coefficients[(kLinks / 2 - 1 - k) * kTilePixels + pixel] =
            from_there ? coefficient<T>(g, image, slope, link - int64_t(dy) * g.width - dx) : 0.0f;
      }
    }
  }
}

// Links of a stencil row to columns -kRowReach ... kRowReach.
template <int kRowReach, bool kHasCentre>
struct Row {
  static constexpr int kTaps = 2 * kRowReach + 1;
  static constexpr int kLinks = kTaps - (kHasCentre ? 0 : 1);
  int dy, first_link;
};

// The first link of stencil row dy; rows 1 and 2 in closed form, as it is used in a loop over them.
constexpr int kMiddle = kLinks / 2;
__device__ constexpr int first_link(int dy) { return kMiddle + 9 * dy - (dy < 0 ? 4 : 5); }
__device__ constexpr int first_link_after(int dy) { return kMiddle + offset_index(5, dy, -stencil_reach(5, dy)); }
__device__ constexpr int first_link_before(int dy) { return kMiddle - 1 - offset_index(5, dy, stencil_reach(5, dy)); }
static_assert(first_link(1) == first_link_after(1) && first_link(2) == first_link_after(2));
static_assert(first_link(-1) == first_link_before(1) && first_link(-2) == first_link_before(2));

// body(row) for all rows of the disc.
template <class Body>
__device__ inline void for_each_row(Body body) {
  constexpr int kAfter3 = first_link_after(3), kBefore3 = first_link_before(3);
  constexpr int kAfter4 = first_link_after(4), kBefore4 = first_link_before(4);
#pragma unroll 1
  for (int dy = -2; dy <= 2; ++dy) {
    if (dy != 0) body(Row<4, true>{dy, first_link(dy)});
  }
#pragma unroll 1
  for (int dy = -3; dy <= 3; dy += 6) body(Row<3, true>{dy, dy < 0 ? kBefore3 : kAfter3});
#pragma unroll 1
  for (int dy = -4; dy <= 4; dy += 8) body(Row<2, true>{dy, dy < 0 ? kBefore4 : kAfter4});
  body(Row<4, false>{0, kMiddle - kReach});
}

template <int kLinksOfRow>
__device__ inline void load_row(float (&h)[kLinksOfRow][kPixels], const float* coefficients, int link) {
#pragma unroll
  for (int i = 0; i < kLinksOfRow; ++i) load_quad(h[i], coefficients + (link + i) * kTilePixels);
}

template <class T, bool kCosine>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 2) gather_kernel(const Gather g) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t image = int(blockIdx.x) / g.tiles;
  const int tile = int(blockIdx.x) % g.tiles;
  const int tile_y = tile / g.tiles_across * kTileRows, tile_x = tile % g.tiles_across * kTileColumns;
  float* const coefficients = block_memory<float>();
  int* const places = block_memory<int>() + kPlacesAt;
  float* const norms = block_memory<float>() + kNormsAt;
  float* const patches = block_memory<float>() + kPatchesAt + warp * kChannels * kPatch;
  const int64_t origin = int64_t(tile_y) * g.width + tile_x;
  load_coefficients<T>(g, image, tile_y, tile_x, coefficients);
  for (int i = threadIdx.x; i < kPatch; i += blockDim.x) {
    const int dy = i / kColumns - kReach, dx = i % kColumns - kReach, y = tile_y + dy, x = tile_x + dx;
    const bool there = y >= 0 && y < g.height && x >= 0 && x < g.width;
    places[i] = there ? dy * g.width + dx : kOutside;
    if (kCosine) norms[i] = there ? g.norms[image * g.plane + origin + places[i]] : 0.0f;
  }
  __syncthreads();

  const int row = lane / (kTileColumns / kPixels), column = lane % (kTileColumns / kPixels) * kPixels;
  const float* const own = coefficients + lane * kPixels;
  float h_sum[kPixels] = {};  // in the order of the sums, so that a flat region's gradient is exactly 0
  if (!kCosine) {
    for_each_row([&](auto stencil_row) {
      float h[decltype(stencil_row)::kLinks][kPixels];
      load_row(h, own, stencil_row.first_link);
#pragma unroll
      for (int i = 0; i < decltype(stencil_row)::kLinks; ++i) {
#pragma unroll
        for (int p = 0; p < kPixels; ++p) h_sum[p] += h[i][p];
      }
    });
  }

  for (int first = (int(blockIdx.y) * warps + warp) * kChannels; first < g.dim;
       first += int(gridDim.y) * warps * kChannels) {
    const int channels = min(kChannels, g.dim - first);
    const int64_t at = (image * g.dim + first) * g.plane + origin;
    const T* const source = static_cast<const T*>(g.feats) + at;
#pragma unroll 5
    for (int i = lane; i < kPatch; i += kWarp) {
      const int place = places[i];
      const float norm = kCosine ? norms[i] : 1.0f;
      const T* from = source + (place != kOutside ? place : 0);
#pragma unroll
      for (int c = 0; c < kChannels; ++c, from += g.plane) {
        const float feature = place != kOutside && c < channels ? to_float(*from) : 0.0f;
        patches[c * kPatch + i] = kCosine ? feature * norm : feature;
      }
    }
    __syncwarp();

    float sum[kChannels][kPixels] = {};
    for_each_row([&](auto stencil_row) {
      constexpr int kRowLinks = decltype(stencil_row)::kLinks, kTaps = decltype(stencil_row)::kTaps;
      float h[kRowLinks][kPixels];
      load_row(h, own, stencil_row.first_link);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float* const centre_at = patches + c * kPatch + (row + kReach) * kColumns + column + kReach;
        const float* const row_at = centre_at + stencil_row.dy * kColumns - kReach;
        float centre[kPixels], window[kPixels + 2 * kReach];
        if (!kCosine) load_quad(centre, centre_at);
#pragma unroll
        for (int i = 0; i < kPixels + 2 * kReach; i += 4) load_quad(window + i, row_at + i);
#pragma unroll
        for (int i = 0; i < kRowLinks; ++i) {
          const int tap = kRowLinks < kTaps && i >= kTaps / 2 ? i + 1 : i;
#pragma unroll
          for (int p = 0; p < kPixels; ++p) {
            const float there = window[kReach - kTaps / 2 + tap + p];
            sum[c][p] = add_link<kCosine>(sum[c][p], h[i][p], kCosine ? 0.0f : centre[p], there);
          }
        }
      }
    });
    __syncwarp();

    // Through the patches, so that a warp writes whole rows.
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      float4 values;
      values.x = gradient_of<kCosine>(sum[c][0], h_sum[0]);
      values.y = gradient_of<kCosine>(sum[c][1], h_sum[1]);
      values.z = gradient_of<kCosine>(sum[c][2], h_sum[2]);
      values.w = gradient_of<kCosine>(sum[c][3], h_sum[3]);
      *reinterpret_cast<float4*>(patches + c * kPatch + lane * kPixels) = values;
    }
    __syncwarp();
    for (int c = 0; c < channels; ++c) {
#pragma unroll
      for (int y = 0; y < kTileRows; ++y) {
        if (tile_y + y >= g.height || tile_x + lane >= g.width) continue;
        write_gradient<T, kCosine>(g, at + c * g.plane + int64_t(y) * g.width + lane,
                                   patches[c * kPatch + y * kTileColumns + lane]);
      }
    }
    __syncwarp();
  }
}

}  // namespace
}  // namespace wsss::radius5
