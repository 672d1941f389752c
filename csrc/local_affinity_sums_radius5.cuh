// The sums for radius 5.
#pragma once
#include "local_affinity_sums.cuh"

namespace wsss::radius5 {
namespace {

constexpr int kRadius = 5;
constexpr int kReach = kRadius - 1;
constexpr int kSlots = neighbour_count(kRadius);
constexpr int kRows = kTileRows + kReach;
constexpr int kColumns = kTileColumns + 2 * kReach;
constexpr int kDepth = 3;    // channels of a slice a stage: two slices of it fit 99 KiB
constexpr int kSummed = 30;  // channels added up in registers before they join the totals
constexpr int kPitch = 48;   // 16 modulo 32 banks: the two rows of eight threads do not meet
constexpr int kLoads = (kRows * kColumns + kSliceThreads - 1) / kSliceThreads;  // of a thread, a channel
constexpr int kPatch = ((kLoads * kSliceThreads - 1) / kColumns + 1) * kPitch;  // with room for loads too many
constexpr int kStage = kDepth * kPatch;
constexpr int kTaps = 9;
static_assert(kSummed % kDepth == 0);
static_assert(kReach == kQuad && kPitch >= kColumns + kQuad && kPitch % 32 == 16);

// Floats of shared memory.
constexpr size_t shared_floats(int slices) { return size_t(slices) * (2 * kStage + kSlots * kTilePixels); }

// Group 0 has the stencil rows 0 and 4, the others one each.
__device__ constexpr int first_slot(int group) { return group == 0 ? 0 : 9 * group - 5; }
static_assert(first_slot(1) == offset_index(5, 1, -4) && first_slot(2) == offset_index(5, 2, -4) &&
              first_slot(3) == offset_index(5, 3, -3));

// A thread's part of a slice's patches: the same places of one stage after the other.
template <class T, bool kCosine>
class Stager {
 public:
  __device__ Stager(const AffinitySums& p, const Tile& tile, int thread, int channel, int step)
      : advance_(step * p.plane) {
    const T* const image = static_cast<const T*>(p.feats) + tile.image * p.dim * p.plane;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      next_[d] = image + (channel + d) * p.plane + int64_t(tile.y) * p.width + tile.x;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int value = thread + i * kSliceThreads, row = value / kColumns, column = value % kColumns;
      const int y = tile.y + row, x = tile.x + column - kReach;
      const bool there = row < kRows && y < p.height && x >= 0 && x < p.width;
      from_[i] = there ? row * p.width + column - kReach : kOutside;
      to_[i] = row * kPitch + quad_at(column / kQuad, kPitch) + column % kQuad;
      if (kCosine) norm_[i] = there ? p.norms[tile.image * p.plane + int64_t(y) * p.width + x] : 0.0f;
    }
  }

  // Of the next stage, of which this many channels exist.
  __device__ void load(int channels) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        loaded_[d][i] = d < channels && from_[i] != kOutside ? next_[d][from_[i]] : T(0.0f);
      }
      next_[d] += advance_;
    }
  }

  __device__ void store(float* stage) const {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const float value = to_float(loaded_[d][i]);
        stage[d * kPatch + to_[i]] = kCosine ? value * norm_[i] : value;
      }
    }
  }

 private:
  static constexpr int kOutside = -2147483647;
  const T* next_[kDepth];
  int64_t advance_;
  int from_[kLoads], to_[kLoads];
  float norm_[kCosine ? kLoads : 1];
  T loaded_[kDepth][kLoads];
};

// The pairs of a stage's channels with stencil row dy, from column kFirst to -kFirst; with row 4 also those of row 0.
// `here`: the thread's first even quad of the patch, four columns to the left of its pixels. One loop a kind of row: of
// a loop around them all the compiler moves the additions behind them, and needs three instructions a pair.
template <bool kCosine, int kFirst>
__device__ inline void add_stage(const float* here, int dy, float (&sum)[kTaps][kPixels]) {
  constexpr int kOdd = kPitch / 2;
#pragma unroll 1
  for (int d = 0; d < kDepth; ++d, here += kPatch) {
    float centre[kPixels], window[kWindow];
    load_quad(centre, here + kOdd);
    load_quad(centre + 4, here + 4);
    const float* const row = here + dy * kPitch;
    load_quad(window, row);
    load_quad(window + 4, row + kOdd);
    load_quad(window + 8, row + 4);
    load_quad(window + 12, row + kOdd + 4);
    if (kFirst == -2) {
      float right[kPixels + kQuad];
#pragma unroll
      for (int i = 0; i < kPixels; ++i) right[i] = centre[i];
      load_quad(right + kPixels, here + kOdd + 4);
      add_pairs<kCosine, 1, 4, 0, 0>(sum, centre, right);
      add_pairs<kCosine, -2, 5, 4, 4>(sum, centre, window);
    } else {
      add_pairs<kCosine, kFirst, 1 - 2 * kFirst, 4, 0>(sum, centre, window);
    }
  }
}

template <class T, bool kCosine>
__global__ void __launch_bounds__(kMaxSlices* kSliceThreads, 1) sums_kernel(const AffinitySums p) {
  const int slice = threadIdx.x / kSliceThreads, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = (warp + slice) % kGroups;  // so that each scheduler of a processor has warps of all groups
  const Tile tile = tile_of(p);
  const int first = int(blockIdx.y) * p.channels, end = min(first + p.channels, p.dim);
  const int step = p.slices * kDepth, stages = (end - first + step - 1) / step;

  float* const patches = block_memory<float>() + slice * 2 * kStage;
  float* const totals = block_memory<float>() + p.slices * 2 * kStage;
  float* const own_totals = totals + slice * kSlots * kTilePixels;
  const int here = lane / (kTileColumns / kPixels) * kPitch + lane % (kTileColumns / kPixels) * kQuad;

  int left = end - first - slice * kDepth;
  Stager<T, kCosine> stager(p, tile, threadIdx.x % kSliceThreads, first + slice * kDepth, step);
  stager.load(left);
  stager.store(patches);
  __syncthreads();
  float sum[kTaps][kPixels] = {};
  int summed = 0;
  bool joined = false;
  for (int stage = 0; stage < stages; ++stage) {
    const bool more = stage + 1 < stages;
    left -= step;
    if (more) stager.load(left);
    const float* const patch = patches + (stage & 1) * kStage + here;
    switch (group) {
      case 0: add_stage<kCosine, -2>(patch, 4, sum); break;
      case 3: add_stage<kCosine, -3>(patch, 3, sum); break;
      default: add_stage<kCosine, -4>(patch, group, sum); break;
    }
    if (more) stager.store(patches + ((stage + 1) & 1) * kStage);
    summed += kDepth;
    if (summed == kSummed || !more) {
      const int taps = group == kGroups - 1 ? kTaps - 2 : kTaps;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const int skipped = group == 0 && tap >= 4 ? offset_index(kRadius, 4, -2) - 4 : 0;
        if (tap < taps) join_totals(own_totals, first_slot(group) + tap + skipped, lane, !joined, sum[tap]);
#pragma unroll
        for (int i = 0; i < kPixels; ++i) sum[tap][i] = 0;
      }
      joined = true;
      summed = 0;
    }
    __syncthreads();
  }
  write_totals<T>(p, totals, kSlots, tile, int(blockIdx.y), [](int slot) { return slot; });
}

}  // namespace
}  // namespace wsss::radius5
