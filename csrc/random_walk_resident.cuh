// The whole walk in one launch. An item is up to four maps of one image. Its blocks own a band of rows each; a thread
// owns a few neighbouring pixels, whose 68 weights stay in its registers, and the maps stand in shared memory with the
// four rows above and below the band. After every product the blocks exchange the rows the others need and meet: as a
// cluster, writing into each other's shared memory, or as a cooperative grid, through global memory.
#pragma once
#include <cooperative_groups.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/cuda_launch.h"
#include "common/neighbourhood.h"
#include "random_walk_device.cuh"

namespace wsss {
namespace {

constexpr int kRadius = 5;
constexpr int kHalo = kRadius - 1;
constexpr int kLinks = 2 * neighbour_count(kRadius);
constexpr int kMaxMaps = 4;
constexpr int kMaxThreads = 256;  // of 255 registers each
constexpr int kMaxClusterBlocks = 16;

// The weights of a thread's pixels. Every index is known when compiled, so that they are registers.
template <class Weight>
struct Links;

template <>
struct Links<float> {
  static constexpr int kPixels = 3;
  static constexpr bool kExact = true;
  float weight[kLinks][kPixels];
  __device__ void set(int link, const float (&values)[kPixels]) {
#pragma unroll
    for (int p = 0; p < kPixels; ++p) weight[link][p] = values[p];
  }
  __device__ float get(int link, int pixel) const { return weight[link][pixel]; }
  __device__ void keep() {}
};

template <>
struct Links<__half> {
  static constexpr int kPixels = 4;
  static constexpr bool kExact = false;
  unsigned pair[kLinks][kPixels / 2];  // two __half each
  __device__ void set(int link, const float (&values)[kPixels]) {
#pragma unroll
    for (int i = 0; i < kPixels / 2; ++i) {
      const unsigned low = __half_as_ushort(__float2half_rn(values[2 * i]));
      const unsigned high = __half_as_ushort(__float2half_rn(values[2 * i + 1]));
      pair[link][i] = low | high << 16;
      keep(pair[link][i]);
    }
  }
  __device__ float get(int link, int pixel) const {
    const unsigned both = pair[link][pixel / 2];
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pixel % 2 ? both >> 16 : both & 0xffffu)));
  }
  // Without this the compiler converts all weights to float ahead of the loop over steps, where they fit no registers.
  __device__ void keep() {
#pragma unroll
    for (int link = 0; link < kLinks; ++link) {
#pragma unroll
      for (int i = 0; i < kPixels / 2; ++i) keep(pair[link][i]);
    }
  }
  static __device__ void keep(unsigned& bits) { asm volatile("" : "+r"(bits)); }
};

constexpr int kTogether = 3;  // links of a pixel loaded at the same time
template <class Weight>
constexpr int kStaged = (2 * kHalo + kTogether) / kTogether * kTogether * Links<Weight>::kPixels;

struct ResidentWalk {
  const float *maps, *affinity;
  float* out;
  float* exchange;  // grid form: [2, items at once, maps an item, H, columns], rows near a band's ends
  int* alive;       // grid form: [2, items at once, blocks]
  int64_t steps;
  double first;  // coefficient of T_0 or T_1
  float beta;
  int items, items_at_once, products, channels, groups, height, width, maps_an_item;
  int blocks, rows;  // of an item; of a band (the last ones may have fewer or none)
  bool by_series;
  // A block's shared memory, in floats: the maps x_k for k even, those for k odd, the series' sum, its coefficients,
  // which maps are walked as each block of the item sees it, and the stage of load_links. A map has the halo on all
  // sides.
  int columns, pitch, map_size, sum_at, series_at, alive_at, stage_at;

  __device__ float* map(int k, int m) const { return block_memory<float>() + ((k & 1) * maps_an_item + m) * map_size; }
  __device__ float* sum(int m) const { return block_memory<float>() + sum_at + m * map_size; }
  __device__ float* series() const { return block_memory<float>() + series_at; }
  __device__ int* alive_here() const { return block_memory<int>() + alive_at; }
  __device__ float* stage() const { return block_memory<float>() + stage_at; }
};

// Devices without clusters run this form with one block an item.
__device__ inline void meet_cluster() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

template <class T>
__device__ T* in_block(T* own, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(own, rank);
#else
  return own;
#endif
}

template <bool kCluster>
__device__ void meet() {
  if (kCluster) {
    meet_cluster();
  } else {
    cooperative_groups::this_grid().sync();
  }
}

// kPixels + 2 kHalo or kPixels floats, at an address that is a multiple of kPixels of them.
template <int kPixels, int kCount>
__device__ void load_floats(const float* from, float (&to)[kCount]) {
  if constexpr (kPixels == 4) {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const float4 loaded = reinterpret_cast<const float4*>(from)[i];
      to[4 * i] = loaded.x, to[4 * i + 1] = loaded.y, to[4 * i + 2] = loaded.z, to[4 * i + 3] = loaded.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }
}

template <int kPixels>
__device__ void store_floats(float* to, const float (&from)[kPixels]) {
  if constexpr (kPixels == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  } else {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) to[i] = from[i];
  }
}

template <int kValue>
using Known = std::integral_constant<int, kValue>;

template <int kDy, int kDx, int kLast, int kLink, class Body>
__device__ __forceinline__ void for_each_link_of_row(Body&& body) {
  if constexpr (kDx <= kLast) {
    constexpr bool kOwn = kDy == 0 && kDx == 0;  // a pixel is no link of itself
    if constexpr (!kOwn) body(Known<kDy>(), Known<kDx>(), Known<kLink>());
    for_each_link_of_row<kDy, kDx + 1, kLast, kOwn ? kLink : kLink + 1>(body);
  }
}

// body(dy, dx, link) for every link of a pixel, all three known when compiled, row by row; before each row row(dy).
template <int kDy = -kHalo, int kLink = 0, class Row, class Body>
__device__ __forceinline__ void for_each_link(Row&& row, Body&& body) {
  if constexpr (kDy <= kHalo) {
    constexpr int kReach = stencil_reach(kRadius, kDy < 0 ? -kDy : kDy);
    row(Known<kDy>());
    for_each_link_of_row<kDy, -kReach, kReach, kLink>(body);
    for_each_link<kDy + 1, kLink + 2 * kReach + (kDy == 0 ? 0 : 1)>(row, body);
  }
}

// Fills `links` with affinity^beta of all links of pixels (y, x) ... and gives back 1 / degree of each. A stencil row
// at a time goes through `stage` (kStaged floats a thread), for in registers a loop's index cannot choose the place.
template <class Weight>
__device__ __forceinline__ void load_links(const ResidentWalk& walk, const float* affinity, int y, int x, float* stage,
                                           Links<Weight>& links, float (&inverse)[Links<Weight>::kPixels]) {
  constexpr int kPixels = Links<Weight>::kPixels;
  const int64_t plane = int64_t(walk.height) * walk.width;
  stage += threadIdx.x;
  double degree[kPixels];
#pragma unroll
  for (int p = 0; p < kPixels; ++p) degree[p] = 1;
  for_each_link(
      [&](auto known_dy) {
        constexpr int dy = known_dy.value, reach = stencil_reach(kRadius, dy < 0 ? -dy : dy);
        constexpr int k_middle = offset_index(kRadius, dy < 0 ? -dy : dy, 0);  // of dx = 0; -1 in the pixel's own row
        const bool in_map = y + dy >= 0 && y + dy < walk.height;
#pragma unroll 1
        for (int first = -reach; first <= reach; first += kTogether) {
          float loaded[kTogether * kPixels];
#pragma unroll
          for (int i = 0; i < kTogether * kPixels; ++i) {
            const int dx = first + i / kPixels, column = x + i % kPixels;
            const bool forward = dy > 0 || (dy == 0 && dx > 0);  // stored here, else at the other end
            const int64_t k = forward ? k_middle + dx : k_middle - dx;
            const int at = forward ? y * walk.width + column : (y + dy) * walk.width + column + dx;
            const bool exists = in_map && dx <= reach && column < walk.width && column + dx >= 0 &&
                                column + dx < walk.width && (dy != 0 || dx != 0);
            loaded[i] = exists ? affinity[k * plane + at] : 0;
          }
#pragma unroll
          for (int i = 0; i < kTogether * kPixels; ++i) {
            stage[((first + reach) * kPixels + i) * int(blockDim.x)] = link_weight(loaded[i], walk.beta);
          }
        }
        stage += reach * kPixels * blockDim.x;  // to dx = 0
      },
      [&](auto dy, auto dx, auto link) {
        constexpr int reach = stencil_reach(kRadius, dy.value < 0 ? -dy.value : dy.value);
        float values[kPixels];
#pragma unroll
        for (int p = 0; p < kPixels; ++p) values[p] = stage[(dx.value * kPixels + p) * int(blockDim.x)];
        links.set(link.value, values);
#pragma unroll
        for (int p = 0; p < kPixels; ++p) degree[p] += double(links.get(link.value, p));
        if constexpr (dx.value == reach) stage -= reach * kPixels * blockDim.x;
      });
#pragma unroll
  for (int p = 0; p < kPixels; ++p) inverse[p] = float(1 / degree[p]);
}

// (P x)_i at a thread's pixels; `from` is the first column the leftmost one needs.
//   exact: the difference form x_i + sum_j W_ij (x_j - x_i) / d_i, whose rounding is relative to what x changes nearby
//   else:  r + (x_i - r + sum_j W_ij (x_j - r)) / d_i with r = x at one of the pixels: it keeps constants too, and a
//          loaded value costs one subtraction instead of one a link. But where r lies across an edge its rounding, the
//          same in every step, adds up to some 1e-4 in 256 steps, which float16 weights exceed anyway.
template <class Weight>
__device__ __forceinline__ void multiply(Links<Weight>& links, const float (&inverse)[Links<Weight>::kPixels],
                                         const float* from, int pitch, float (&product)[Links<Weight>::kPixels]) {
  constexpr int kPixels = Links<Weight>::kPixels;
  constexpr bool kExact = Links<Weight>::kExact;
  links.keep();
  float centre[kPixels], sum[kPixels], row[kPixels + 2 * kHalo];
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    centre[p] = from[kHalo + (kExact ? p : kPixels / 2)];
    sum[p] = 0;
  }
  for_each_link(
      [&](auto dy) {
        constexpr int kReach = stencil_reach(kRadius, dy.value < 0 ? -dy.value : dy.value);
        load_floats<kPixels>(from + dy.value * pitch, row);
        if constexpr (!kExact) {
#pragma unroll
          for (int i = kHalo - kReach; i < kPixels + kHalo + kReach; ++i) row[i] -= centre[0];
        }
        if constexpr (!kExact && dy.value == 0) {
#pragma unroll
          for (int p = 0; p < kPixels; ++p) sum[p] += row[p + kHalo];
        }
      },
      [&](auto, auto dx, auto link) {
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          const float value = row[p + dx.value + kHalo];
          sum[p] += links.get(link.value, p) * (kExact ? value - centre[p] : value);
        }
      });
#pragma unroll
  for (int p = 0; p < kPixels; ++p) product[p] = centre[p] + inverse[p] * sum[p];
}

template <class Weight, bool kCluster>
class Band {
 public:
  static constexpr int kPixels = Links<Weight>::kPixels;

  __device__ Band(const ResidentWalk& walk, int round)
      : walk_(walk),
        item_(int(blockIdx.x) / walk.blocks + round * walk.items_at_once),
        rank_(int(blockIdx.x) % walk.blocks),
        slot_(kCluster ? item_ : item_ % walk.items_at_once) {
    const int groups = (walk.width + kPixels - 1) / kPixels;  // of pixels, a row
    y_ = begin() + int(threadIdx.x) / groups;
    x_ = int(threadIdx.x) % groups * kPixels;
  }

  __device__ bool exists() const { return item_ < walk_.items; }
  __device__ bool works() const { return y_ < end(); }  // the last threads of a block may own no pixel

  // Loads the maps with their halo and says which of them are not all zeros: the same answer in all blocks of the item.
  __device__ int load(int round) {
    const int count = walk_.sum_at;
    for (int i = threadIdx.x; i < count; i += blockDim.x) block_memory<float>()[i] = 0;
    int* const alive = walk_.alive_here();
    if (threadIdx.x < kMaxClusterBlocks) alive[threadIdx.x] = 0;
    if (walk_.by_series && threadIdx.x == blockDim.x - 1) {
      write_series(walk_.series(), walk_.first, walk_.steps, walk_.products);
    }
    __syncthreads();
    const int top = max(begin() - kHalo, 0), bottom = min(end() + kHalo, walk_.height);
    const int here = kCluster ? rank_ : 0;
    int walked = 0;
    for (int m = 0; exists() && m < maps(); ++m) {
      const float* const source = walk_.maps + plane_of(m);
      for (int i = threadIdx.x; i < (bottom - top) * walk_.width; i += blockDim.x) {
        const int y = top + i / walk_.width, x = i % walk_.width;
        const float value = source[int64_t(y) * walk_.width + x];
        walk_.map(0, m)[(y - begin() + kHalo) * walk_.pitch + x + kHalo] = value;
        if (y >= begin() && y < end() && !(value == 0)) walked |= 1 << m;
      }
    }
    if (walked) atomicOr(&alive[here], walked);
    __syncthreads();
    walked = 0;
    if (kCluster) {
      meet<kCluster>();  // from here on the others may write into this block's memory
      for (int rank = threadIdx.x; rank < walk_.blocks; rank += blockDim.x) {
        if (rank != rank_) in_block(alive, rank)[rank_] = alive[rank_];
      }
      meet<kCluster>();
      for (int rank = 0; rank < walk_.blocks; ++rank) walked |= alive[rank];
    } else {
      int* const all = walk_.alive + ((round & 1) * walk_.items_at_once + slot_) * walk_.blocks;
      if (threadIdx.x == 0) all[rank_] = alive[0];
      meet<kCluster>();
      for (int rank = 0; rank < walk_.blocks; ++rank) walked |= all[rank];
    }
    return walked;
  }

  __device__ void write_zeros() const {
    for (int m = 0; exists() && m < maps(); ++m) {
      for (int i = begin() * walk_.width + threadIdx.x; i < end() * walk_.width; i += blockDim.x) {
        walk_.out[plane_of(m) + i] = 0;
      }
    }
  }

  __device__ void load_links() {
    const int64_t plane = int64_t(walk_.height) * walk_.width;
    const float* const affinity = walk_.affinity + item_ / walk_.groups * (kLinks / 2) * plane;
    wsss::load_links(walk_, affinity, y_, x_, walk_.stage(), links_, inverse_);
  }

  // x_k from x_{k-1} (and by the series x_{k-2}, whose place it takes) for the maps in `walked`.
  __device__ void step(int k, int walked) {
    const int own = (y_ - begin() + kHalo) * walk_.pitch + x_ + kHalo;
    const float coefficient = walk_.by_series ? walk_.series()[k] : 0;
    for (int m = 0; m < maps(); ++m) {
      if (!(walked >> m & 1)) continue;
      float value[kPixels];
      multiply(links_, inverse_, walk_.map(k - 1, m) + own - kHalo, walk_.pitch, value);
      float* const next = walk_.map(k, m) + own;
      if (walk_.by_series) {
        float sum[kPixels], before[kPixels];
        float* const sum_at = walk_.sum(m) + own;
        if (k == 1) {
          load_floats<kPixels>(walk_.map(0, m) + own, sum);
#pragma unroll
          for (int p = 0; p < kPixels; ++p) sum[p] *= walk_.series()[0];
        } else {
          load_floats<kPixels>(sum_at, sum);
          load_floats<kPixels>(next, before);
#pragma unroll
          for (int p = 0; p < kPixels; ++p) value[p] = 2 * value[p] - before[p];
        }
#pragma unroll
        for (int p = 0; p < kPixels; ++p) sum[p] += coefficient * value[p];
        store_floats(sum_at, sum);
      }
      store_floats(next, value);
      if (k < walk_.products) send(k, m, value);
    }
  }

  // The grid form's halo rows of x_k: threads keep their columns and take the lines in turn.
  __device__ void receive(int k, int walked) const {
    const int above = min(begin(), kHalo), lines = above + min(walk_.height - end(), kHalo);
    const int first = y_ - begin() < walk_.rows ? y_ - begin() : lines;  // the last threads may have no line
    for (int m = 0; m < maps(); ++m) {
      if (!(walked >> m & 1)) continue;
      for (int line = first; line < lines; line += walk_.rows) {
        const int y = line < above ? begin() - above + line : end() + line - above;
        float value[kPixels];
        load_floats<kPixels>(exchange(k, m) + y * walk_.columns + x_, value);
        store_floats(walk_.map(k, m) + (y - begin() + kHalo) * walk_.pitch + x_ + kHalo, value);
      }
    }
    __syncthreads();
  }

  __device__ void write(int walked) const {
    const int own = (y_ - begin() + kHalo) * walk_.pitch + x_ + kHalo;
    for (int m = 0; m < maps(); ++m) {
      const float* const from = (walk_.by_series ? walk_.sum(m) : walk_.map(walk_.products, m)) + own;
      float* const to = walk_.out + plane_of(m) + int64_t(y_) * walk_.width + x_;
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        if (x_ + p < walk_.width) to[p] = walked >> m & 1 ? from[p] : 0.0f;
      }
    }
  }

 private:
  // The band's rows [begin, end).
  __device__ int begin() const { return min(rank_ * walk_.rows, walk_.height); }
  __device__ int end() const { return min(begin() + walk_.rows, walk_.height); }
  __device__ int maps() const {
    return min(walk_.maps_an_item, walk_.channels - int(item_ % walk_.groups) * walk_.maps_an_item);
  }
  __device__ int64_t plane_of(int m) const {
    const int64_t map = int64_t(item_ / walk_.groups) * walk_.channels + item_ % walk_.groups * walk_.maps_an_item + m;
    return map * walk_.height * walk_.width;
  }
  __device__ float* exchange(int k, int m) const {
    const int64_t map = (int64_t(k & 1) * walk_.items_at_once + slot_) * walk_.maps_an_item + m;
    return walk_.exchange + map * walk_.height * walk_.columns;
  }

  // Own values of x_k to the bands within four rows.
  __device__ void send(int k, int m, const float (&value)[kPixels]) const {
    if (kCluster) {
      float* const own = walk_.map(k, m) + (y_ + kHalo) * walk_.pitch + x_ + kHalo;  // were this band the first
      const int band = walk_.rows * walk_.pitch;
      for (int rank = rank_ - 1; rank >= 0 && y_ < (rank + 1) * walk_.rows + kHalo; --rank) {
        store_floats(in_block(own - rank * band, rank), value);
      }
      for (int rank = rank_ + 1; rank < walk_.blocks && y_ >= rank * walk_.rows - kHalo; ++rank) {
        store_floats(in_block(own - rank * band, rank), value);
      }
    } else if (y_ < begin() + kHalo || y_ >= end() - kHalo) {
      float* const to = exchange(k, m) + begin() * walk_.columns + int(threadIdx.x) * kPixels;
#pragma unroll
      for (int p = 0; p < kPixels; ++p) to[p] = value[p];
    }
  }

  const ResidentWalk& walk_;
  const int item_;
  const int rank_;
  const int slot_;  // among the items at once
  int y_, x_;       // the thread's first pixel
  Links<Weight> links_;
  float inverse_[kPixels];
};

template <class Weight, bool kCluster>
__global__ void __launch_bounds__(kMaxThreads, 1) resident_walk_kernel(const ResidentWalk walk) {
  const int rounds = kCluster ? 1 : (walk.items + walk.items_at_once - 1) / walk.items_at_once;
  for (int round = 0; round < rounds; ++round) {
    Band<Weight, kCluster> band(walk, round);
    const int walked = band.load(round);
    if (!walked) band.write_zeros();
    if (kCluster && !walked) return;
    if (walked && band.works()) band.load_links();
    for (int k = 1; k <= walk.products; ++k) {
      if (walked && band.works()) band.step(k, walked);
      if (k == walk.products) break;
      meet<kCluster>();
      if (!kCluster) band.receive(k, walked);
    }
    if (walked && band.works()) band.write(walked);
    __syncthreads();  // before the next round clears what others may still read
  }
}

}  // namespace
}  // namespace wsss
