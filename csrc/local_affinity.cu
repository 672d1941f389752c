// local_affinity on the GPU: the sums over channels (local_affinity_sums*.cuh), and what turns them into affinities
// where their kernel cannot: sums split over blocks, and the automatic scale.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "common/workspace.h"
#include "local_affinity_sums_any_radius.cuh"
#include "local_affinity_sums_radius5.cuh"

namespace wsss {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 4 * kThreads;      // values of one neighbour a block takes at a time
constexpr int kMaxBlocks = 1024;          // of an image with the automatic scale: a partial sum each
constexpr size_t kReservedShared = 1024;  // of a block, by the system
constexpr int kNormPixels = 32;           // of a block
constexpr int kNormSlices = 16;           // of the channels
constexpr float kCosineNoise = 1e-6f;     // a mean of 1 - cos up to this is rounding, not a difference

template <class T>
__global__ void inverse_norms_kernel(const T* feats, float* norms, int64_t batch, int dim, int64_t plane) {
  double* const squares = block_memory<double>();  // [slice, pixel]
  const int lane = threadIdx.x % kNormPixels, slice = threadIdx.x / kNormPixels;
  for (int64_t block = blockIdx.x; block * kNormPixels < batch * plane; block += gridDim.x) {
    const int64_t pixel = block * kNormPixels + lane, image = pixel / plane;
    double square = 0;  // the square of no float overflows or vanishes in double
    if (pixel < batch * plane) {
      const T* const from = feats + image * dim * plane + (pixel - image * plane);
#pragma unroll 8
      for (int d = slice; d < dim; d += kNormSlices) {
        const double v = to_float(from[d * plane]);
        square += v * v;
      }
    }
    squares[threadIdx.x] = square;
    __syncthreads();
    if (slice == 0 && pixel < batch * plane) {
      for (int s = 1; s < kNormSlices; ++s) square += squares[s * kNormPixels + lane];
      norms[pixel] = square == 0 ? 0.0f : float(1 / sqrt(square));
    }
    __syncthreads();
  }
}

// Adds up the block's values in one order; the result is thread 0's.
__device__ double block_sum(double value) {
  double* const values = block_memory<double>();
  values[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) values[threadIdx.x] += values[threadIdx.x + half];
  }
  __syncthreads();
  return values[0];
}

struct Finish {
  AffinitySums sums;  // with their splits
  void* out;
  double* partial;  // [B, blocks] of the distances' sums, automatic scale
  float* scale;
  double pairs;
  int blocks;  // of an image
};

// body(k, y, x, place in an image's [K, H, W]) for this block's share of its image.
template <class Body>
__device__ void for_each_value(const Finish& f, Body body) {
  const AffinitySums& p = f.sums;
  const int chunks = int((p.plane + kChunk - 1) / kChunk);
  for (int64_t item = int(blockIdx.x) % f.blocks; item < int64_t(p.count) * chunks; item += f.blocks) {
    const int k = int(item / chunks);
    const int64_t first = item % chunks * kChunk, end = min(first + kChunk, p.plane);
    const int row = int(first / p.width), column = int(first - int64_t(row) * p.width);
    for (int64_t pixel = first + threadIdx.x; pixel < end; pixel += kThreads) {
      const int x = column + int(pixel - first), rows = x / p.width;
      body(k, row + rows, x - rows * p.width, k * p.plane + pixel);
    }
  }
}

__device__ float sum_of_splits(const AffinitySums& p, int64_t at) {
  float sum = 0;
  for (int split = 0; split < p.splits; ++split) sum += p.sums[split * p.batch * p.count * p.plane + at];
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const Finish f) {
  const AffinitySums& p = f.sums;
  const int64_t image = int(blockIdx.x) / f.blocks, base = image * p.count * p.plane;
  for_each_value(f, [&](int k, int y, int x, int64_t at) {
    const bool there = in_map(p, y, x, k) && !cropped_away(p, y, x);
    store(static_cast<T*>(f.out) + base + at, there ? affinity_of(p.rule, sum_of_splits(p, base + at)) : 0.0f);
  });
}

// The distances, in place of the first split, and their sum.
__global__ void __launch_bounds__(kThreads) distances_kernel(const Finish f) {
  const AffinitySums& p = f.sums;
  const int64_t image = int(blockIdx.x) / f.blocks, base = image * p.count * p.plane;
  const float inverse_dim = 1.0f / float(p.dim);
  double total = 0;
  for_each_value(f, [&](int k, int y, int x, int64_t at) {
    if (!in_map(p, y, x, k)) return;
    const float sum = sum_of_splits(p, base + at);
    const float distance = p.rule.cosine ? (sum > 1.0f ? 0.0f : 1.0f - sum) : sum * inverse_dim;
    p.sums[base + at] = distance;
    total += double(distance);
  });
  total = block_sum(total);
  if (threadIdx.x == 0) f.partial[blockIdx.x] = total;
}

template <class T>
__global__ void __launch_bounds__(kThreads) scaled_kernel(const Finish f) {
  const AffinitySums& p = f.sums;
  const int64_t image = int(blockIdx.x) / f.blocks, base = image * p.count * p.plane;
  double total = 0;
  for (int i = threadIdx.x; i < f.blocks; i += kThreads) total += f.partial[image * f.blocks + i];
  total = block_sum(total);
  const float mean = f.pairs > 0 ? float(total / f.pairs) : 0.0f;
  const float scale = mean <= (p.rule.cosine ? kCosineNoise : 0.0f) ? 1.0f : mean;
  if (int(blockIdx.x) % f.blocks == 0 && threadIdx.x == 0) f.scale[image] = scale;
  for_each_value(f, [&](int k, int y, int x, int64_t at) {
    const bool there = in_map(p, y, x, k) && !cropped_away(p, y, x);
    store(static_cast<T*>(f.out) + base + at, there ? expf(-p.sums[base + at] / scale) : 0.0f);
  });
}

__global__ void fill_scale_kernel(float* scale, int64_t batch, float value) {
  for (int64_t b = threadIdx.x; b < batch; b += kThreads) scale[b] = value;
}

float used_scale(const AffinityOptions& options) {
  return options.automatic ? 1.0f : std::max(float(options.scale), kLeastScale);
}

double in_map_pairs(const FeatureShape& shape, const Neighbourhood& hood) {
  double pairs = 0;
  for (int k = 0; k < hood.count; ++k) {
    const int64_t rows = shape.height - hood.dy[k], columns = shape.width - std::abs(hood.dx[k]);
    if (rows > 0 && columns > 0) pairs += double(rows) * double(columns);
  }
  return pairs;
}

// The segments of any radius, by rows.
void fill_segments(AffinitySums* p) {
  p->segments = 0;
  for (int dy = 0; dy < p->radius; ++dy) {
    const int reach = stencil_reach(p->radius, dy);
    const int first = dy == 0 ? 0 : -(reach + kQuad - 1) / kQuad * kQuad;
    for (int dx = first; dx <= reach; dx += kSegmentTaps) {
      const int k = offset_index(p->radius, dy, dx);
      p->segment[p->segments++] = {static_cast<signed char>(dy), static_cast<signed char>(dx), static_cast<short>(k)};
    }
  }
}

// How many blocks share the channels of a tile: the least time by a rough count in channels of one block. A block has
// its own costs, a split those of the sums written and read and of one more launch.
int choose_splits(int64_t blocks, int dim, int step, int processors, int at_once) {
  constexpr double kBlockCost = 16, kSumsCost = 7, kLaunchCost = 16;
  const double room = double(processors) * at_once;
  int best = 1;
  double least = 0;
  for (int splits = 1; splits <= std::min(64, dim); ++splits) {
    const int channels = int(blocks_of(blocks_of(dim, splits), step)) * step;
    const double waves = std::ceil(double(blocks) * splits / room);
    double cost = waves * (channels + kBlockCost);
    if (splits > 1) cost += kLaunchCost + kSumsCost * double(blocks) * splits / room;
    if (splits == 1 || cost < least) best = splits, least = cost;
  }
  return best;
}

struct Plan {
  AffinitySums sums;  // without pointers
  int64_t blocks;     // grid.x
  int sets;           // of segments
  size_t shared;
};

Plan plan_of(const FeatureShape& shape, const AffinityOptions& options) {
  Plan plan = {};
  AffinitySums& p = plan.sums;
  const Neighbourhood hood = make_neighbourhood(options.radius);
  p.batch = shape.batch, p.plane = shape.height * shape.width;
  p.dim = int(shape.dim), p.height = int(shape.height), p.width = int(shape.width);
  p.radius = options.radius, p.count = hood.count;
  p.used_scale = used_scale(options);
  p.automatic = options.automatic;
  p.rule = {options.metric == AffinityMetric::kCosine, options.cropped, options.radius - 1,
            float(-1 / (double(shape.dim) * double(p.used_scale)))};
  for (int k = 0; k < hood.count; ++k) {
    p.offsets.dy[k] = static_cast<signed char>(hood.dy[k]);
    p.offsets.dx[k] = static_cast<signed char>(hood.dx[k]);
  }
  p.tiles_across = int(blocks_of(shape.width, kTileColumns));
  p.tiles = p.tiles_across * int(blocks_of(shape.height, kTileRows));
  plan.blocks = shape.batch * int64_t(p.tiles);

  const int processors = cuda_attribute(cudaDevAttrMultiProcessorCount);
  int step = any_radius::kDepth;
  if (options.radius == radius5::kRadius) {
    const size_t offered = size_t(cuda_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    p.slices = kMaxSlices;
    while (p.slices > 1 && radius5::shared_floats(p.slices) * sizeof(float) > offered) --p.slices;
    p.slices = std::max(1, std::min(p.slices, p.dim / (4 * radius5::kDepth)));
    step = radius5::kDepth * p.slices;
    plan.sets = 1;
    plan.shared = radius5::shared_floats(p.slices) * sizeof(float);
  } else {
    fill_segments(&p);
    p.slices = 1;
    plan.sets = int(blocks_of(p.segments, kGroups));
    plan.shared = any_radius::shared_floats(options.radius) * sizeof(float);
  }
  const auto shared_per_processor = size_t(cuda_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  const auto fitting = int(shared_per_processor / (plan.shared + kReservedShared));
  const int at_once = std::max(1, std::min(kMaxSlices / p.slices, fitting));
  p.splits = choose_splits(plan.blocks * plan.sets, p.dim, step, processors, at_once);
  p.channels = int(blocks_of(blocks_of(p.dim, p.splits), step)) * step;
  p.splits = int(blocks_of(p.dim, p.channels));
  return plan;
}

bool empty(const FeatureShape& shape, const AffinityOptions& options) {
  return shape.batch * shape.height * shape.width == 0 || neighbour_count(options.radius) == 0;
}

int blocks_an_image(const AffinitySums& p) {
  return int(std::min<int64_t>(p.count * blocks_of(p.plane, kChunk), kMaxBlocks));
}

void place(Plan* plan, Workspace* workspace, float** norms, double** partial) {
  AffinitySums& p = plan->sums;
  const size_t values = size_t(p.batch) * p.count * p.plane;
  *norms = p.rule.cosine ? workspace->take<float>(size_t(p.batch) * p.plane) : nullptr;
  p.norms = *norms;
  p.sums = p.automatic || p.splits > 1 ? workspace->take<float>(p.splits * values) : nullptr;
  *partial = p.automatic ? workspace->take<double>(size_t(p.batch) * blocks_an_image(p)) : nullptr;
}

template <class T>
void launch_sums(const Plan& plan, cudaStream_t stream) {
  const AffinitySums& p = plan.sums;
  const bool five = p.radius == radius5::kRadius;
  const auto kernel = five ? (p.rule.cosine ? &radius5::sums_kernel<T, true> : &radius5::sums_kernel<T, false>)
                           : (p.rule.cosine ? &any_radius::sums_kernel<T, true> : &any_radius::sums_kernel<T, false>);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared)),
             "local_affinity sums");
  const dim3 grid(unsigned(plan.blocks), unsigned(plan.sets * p.splits));
  launch("local_affinity sums", {grid, dim3(unsigned(p.slices * kSliceThreads)), plan.shared, stream}, kernel, p);
}

}  // namespace

void launch_inverse_norms(const void* feats, float* norms, FeatureShape shape, DataType type, cudaStream_t stream) {
  const int64_t plane = shape.height * shape.width;
  const auto blocks = unsigned(std::min(blocks_of(shape.batch * plane, kNormPixels), kMostBlocks));
  constexpr int kBlockThreads = kNormPixels * kNormSlices;
  const Launch how = {dim3(blocks), dim3(kBlockThreads), kBlockThreads * sizeof(double), stream};
  with_data_type(type, [&](auto zero) {
    using T = decltype(zero);
    launch("local_affinity norms", how, &inverse_norms_kernel<T>, static_cast<const T*>(feats), norms, shape.batch,
           int(shape.dim), plane);
  });
}

size_t local_affinity_cuda_workspace(FeatureShape shape, const AffinityOptions& options, DataType) {
  if (empty(shape, options)) return 0;
  Plan plan = plan_of(shape, options);
  Workspace workspace(nullptr);
  float* norms;
  double* partial;
  place(&plan, &workspace, &norms, &partial);
  return workspace.bytes();
}

void local_affinity_cuda(const void* feats, void* out, float* scale, FeatureShape shape, const AffinityOptions& options,
                         DataType type, void* workspace, void* stream) {
  const auto on_stream = static_cast<cudaStream_t>(stream);
  if (shape.batch == 0) return;
  if (empty(shape, options)) {
    return launch("local_affinity scale", {dim3(1), dim3(kThreads), 0, on_stream}, &fill_scale_kernel, scale,
                  shape.batch, used_scale(options));
  }
  Plan plan = plan_of(shape, options);
  Workspace parts(workspace);
  float* norms;
  double* partial;
  place(&plan, &parts, &norms, &partial);
  plan.sums.feats = feats, plan.sums.out = out, plan.sums.scale = scale;
  if (norms) launch_inverse_norms(feats, norms, shape, type, on_stream);
  with_data_type(type, [&](auto zero) {
    using T = decltype(zero);
    launch_sums<T>(plan, on_stream);
    if (!plan.sums.sums) return;
    const int blocks = blocks_an_image(plan.sums);
    const double pairs = in_map_pairs(shape, make_neighbourhood(options.radius));
    const Finish finish = {plan.sums, out, partial, scale, pairs, blocks};
    const dim3 grid(unsigned(shape.batch * blocks)), block(kThreads);
    const size_t shared = kThreads * sizeof(double);
    if (options.automatic) {
      launch("local_affinity distances", {grid, block, shared, on_stream}, &distances_kernel, finish);
      launch("local_affinity scaled", {grid, block, shared, on_stream}, &scaled_kernel<T>, finish);
    } else {
      launch("local_affinity finish", {grid, block, 0, on_stream}, &finish_kernel<T>, finish);
    }
  });
}

}  // namespace wsss
