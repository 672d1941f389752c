// The gradient of local_affinity on the GPU: gathered (local_affinity_gather*.cuh), and through the norm of the cosine.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/workspace.h"
#include "local_affinity_gather.cuh"
#include "local_affinity_gather_radius5.cuh"

namespace wsss {
namespace {

// d/df of a function of u = f / |f| whose gradient in u is float_out: what is along f goes, the rest shrinks by |f|.
namespace norm {

constexpr int kPixels = 32;  // of a block
constexpr int kSlices = 16;  // of the channels
constexpr int kThreads = kPixels * kSlices;

template <class T>
__global__ void __launch_bounds__(kThreads) through_norm_kernel(const Gather g) {
  float* const parts = block_memory<float>();  // [slice, pixel]
  const int lane = threadIdx.x % kPixels, slice = threadIdx.x / kPixels;
  for (int64_t block = blockIdx.x; block * kPixels < g.batch * g.plane; block += gridDim.x) {
    const int64_t pixel = block * kPixels + lane, image = pixel / g.plane;
    const bool there = pixel < g.batch * g.plane;
    const int64_t first = image * g.dim * g.plane + (pixel - image * g.plane);
    const T* const feats = static_cast<const T*>(g.feats);
    const float norm = there ? g.norms[pixel] : 0.0f;
    float along = 0;
    if (there) {
#pragma unroll 4
      for (int d = slice; d < g.dim; d += kSlices) {
        const int64_t at = first + d * g.plane;
        along = fmaf(to_float(feats[at]) * norm, g.float_out[at], along);
      }
    }
    parts[threadIdx.x] = along;
    __syncthreads();
    along = 0;
    for (int s = 0; s < kSlices; ++s) along += parts[s * kPixels + lane];
    if (there) {
      for (int d = slice; d < g.dim; d += kSlices) {
        const int64_t at = first + d * g.plane;
        store(static_cast<T*>(g.out) + at, (g.float_out[at] - to_float(feats[at]) * norm * along) * norm);
      }
    }
    __syncthreads();
  }
}

}  // namespace norm

template <class T, bool kCosine>
void launch_gather(Gather g, cudaStream_t stream) {
  constexpr int64_t kMostSplits = 65535;
  if (g.radius != radius5::kReach + 1) {
    g.tiles = int(blocks_of(g.plane, any_radius::kThreads));
    const int64_t splits = std::min(blocks_of(g.dim, any_radius::kChannels), kMostSplits);
    const dim3 grid(unsigned(g.batch * int64_t(g.tiles)), unsigned(splits));
    return launch("local_affinity_backward", {grid, dim3(any_radius::kThreads), 0, stream},
                  &any_radius::gather_kernel<T, kCosine>, g);
  }
  g.tiles_across = int(blocks_of(g.width, radius5::kTileColumns));
  g.tiles = g.tiles_across * int(blocks_of(g.height, radius5::kTileRows));
  const size_t offered = size_t(cuda_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  const int64_t processors = cuda_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t sets = blocks_of(g.dim, radius5::kChannels);
  int warps = int(std::min<int64_t>(radius5::kMaxWarps, sets));
  while (warps > 1 && radius5::shared_floats(warps) * sizeof(float) > offered) --warps;
  // Enough blocks for two a processor, but the coefficients are loaded once for each.
  const int64_t wanted = blocks_of(2 * processors, g.batch * int64_t(g.tiles));
  const int64_t splits = std::min(std::min(wanted, blocks_of(sets, warps)), kMostSplits);
  const size_t shared = radius5::shared_floats(warps) * sizeof(float);
  const auto kernel = &radius5::gather_kernel<T, kCosine>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
             "local_affinity_backward");
  const dim3 grid(unsigned(g.batch * int64_t(g.tiles)), unsigned(splits));
  launch("local_affinity_backward", {grid, dim3(unsigned(warps * kWarp)), shared, stream}, kernel, g);
}

bool is_empty(const FeatureShape& shape) { return shape.batch * shape.dim * shape.height * shape.width == 0; }

// The norms, and for 16-bit data the gradient in u.
void place(Gather* g, float** norms, DataType type, Workspace* workspace) {
  const size_t pixels = size_t(g->batch) * g->plane;
  *norms = workspace->take<float>(pixels);
  g->norms = *norms;
  g->float_out = type == DataType::kFloat32 ? static_cast<float*>(g->out) : workspace->take<float>(pixels * g->dim);
}

Gather gather_of(const FeatureShape& shape, const AffinityOptions& options) {
  const bool cosine = options.metric == AffinityMetric::kCosine;
  Gather g = {};
  g.batch = shape.batch, g.plane = shape.height * shape.width;
  g.dim = int(shape.dim), g.height = int(shape.height), g.width = int(shape.width);
  g.radius = options.radius, g.count = neighbour_count(options.radius);
  g.exponential = !cosine || options.automatic;
  g.per_distance = cosine ? -1.0f : 1.0f / float(shape.dim);
  return g;
}

}  // namespace

size_t local_affinity_backward_cuda_workspace(FeatureShape shape, const AffinityOptions& options, DataType type) {
  if (is_empty(shape) || options.metric != AffinityMetric::kCosine) return 0;
  Gather g = gather_of(shape, options);
  float* norms;
  Workspace parts(nullptr);
  place(&g, &norms, type, &parts);
  return parts.bytes();
}

void local_affinity_backward_cuda(const void* grad, const void* feats, const void* affinity, const float* scale,
                                  void* grad_feats, FeatureShape shape, const AffinityOptions& options, DataType type,
                                  void* workspace, void* stream) {
  if (is_empty(shape)) return;
  const auto on_stream = static_cast<cudaStream_t>(stream);
  Gather g = gather_of(shape, options);
  g.grad = grad, g.feats = feats, g.affinity = affinity, g.scale = scale, g.out = grad_feats;
  const bool cosine = options.metric == AffinityMetric::kCosine;
  if (cosine) {
    float* norms;
    Workspace parts(workspace);
    place(&g, &norms, type, &parts);
    launch_inverse_norms(feats, norms, shape, type, on_stream);
  }
  with_data_type(type, [&](auto zero) {
    using T = decltype(zero);
    if (!cosine) return launch_gather<T, false>(g, on_stream);
    launch_gather<T, true>(g, on_stream);
    const int64_t blocks = std::min(blocks_of(g.batch * g.plane, norm::kPixels), kMostBlocks);
    launch("local_affinity_backward norm",
           {dim3(unsigned(blocks)), dim3(norm::kThreads), norm::kThreads * sizeof(float), on_stream},
           &norm::through_norm_kernel<T>, g);
  });
}

}  // namespace wsss
