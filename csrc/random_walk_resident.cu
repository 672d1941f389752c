#include "random_walk_resident.h"

#include <algorithm>
#include <climits>

#include "common/cuda_launch.h"
#include "common/workspace.h"
#include "random_walk_resident.cuh"

namespace wsss {
namespace {

// A band of few rows waits for more others and sends every row to several of them.
constexpr int kLeastRows = 4;

struct Device {
  int processors, shared;
  bool clusters, cooperative;
};

Device current_device() {
  return {cuda_attribute(cudaDevAttrMultiProcessorCount), cuda_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          cuda_attribute(cudaDevAttrClusterLaunch) != 0, cuda_attribute(cudaDevAttrCooperativeLaunch) != 0};
}

int rows_of(const WalkShape& shape, int blocks) { return int((shape.height + blocks - 1) / blocks); }

int items_of(const WalkShape& shape, int maps) { return int(shape.batch * ((shape.channels + maps - 1) / maps)); }

template <class Weight>
ResidentWalk describe(const WalkShape& shape, const WalkOptions& options, const WalkMethod& method,
                      const CudaWalkPlan& plan) {
  constexpr int kPixels = Links<Weight>::kPixels;
  ResidentWalk walk = {};
  walk.channels = int(shape.channels);
  walk.height = int(shape.height);
  walk.width = int(shape.width);
  walk.maps_an_item = plan.maps;
  walk.groups = int((shape.channels + plan.maps - 1) / plan.maps);
  walk.items = items_of(shape, plan.maps);
  walk.items_at_once = plan.items_at_once;
  walk.blocks = plan.blocks;
  walk.rows = rows_of(shape, plan.blocks);
  walk.beta = float(std::min(options.beta, 3e38));  // an infinite power of 1 would be NaN
  walk.steps = options.steps;
  walk.by_series = !method.series.empty();
  walk.products = int(walk.by_series ? int64_t(method.series.size()) - 1 : method.steps);
  walk.first = walk.by_series ? method.series[options.steps % 2] : 0;
  walk.columns = (walk.width + kPixels - 1) / kPixels * kPixels;
  walk.pitch = (walk.columns + 2 * kHalo + 3) / 4 * 4;
  walk.map_size = (walk.rows + 2 * kHalo) * walk.pitch;
  walk.sum_at = 2 * plan.maps * walk.map_size;
  walk.series_at = walk.sum_at + plan.maps * walk.map_size;
  walk.alive_at = walk.series_at + (walk.by_series ? walk.products + 1 : 0);
  walk.stage_at = walk.alive_at + kMaxClusterBlocks;
  return walk;
}

template <class Weight, bool kCluster>
void allow(const CudaWalkPlan& plan) {
  const auto kernel = &resident_walk_kernel<Weight, kCluster>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared),
             "resident_walk_kernel");
  if (kCluster && plan.blocks > 8) {  // more than every device with clusters offers
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "resident_walk_kernel");
  }
}

template <class Weight>
bool cluster_exists(const CudaWalkPlan& plan) {
  if (plan.blocks == 1) return true;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(plan.blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(plan.blocks));
  config.blockDim = dim3(unsigned(plan.threads));
  config.dynamicSmemBytes = size_t(plan.shared);
  config.attrs = &attribute;
  config.numAttrs = 1;
  allow<Weight, true>(plan);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, &resident_walk_kernel<Weight, true>, &config) == cudaSuccess) {
    return clusters > 0;
  }
  cudaGetLastError();
  return false;
}

// Chooses the plan's blocks and what follows from them; the form and the maps an item are given.
template <class Weight>
class Planner {
 public:
  Planner(const WalkShape& shape, const WalkOptions& options, const WalkMethod& method)
      : shape_(shape), options_(options), method_(method), device_(current_device()) {}

  bool plan(CudaWalkPlan* plan) const {
    // One map an item where the device has room for that: less to do between two meetings.
    for (const WalkForm form : {WalkForm::kCluster, WalkForm::kGrid}) {
      plan->form = form;
      for (const int maps : {1, kMaxMaps}) {
        plan->maps = int(std::min<int64_t>(shape_.channels, maps));
        const bool last = maps == kMaxMaps;
        const bool found = form == WalkForm::kCluster ? plan_cluster(plan) : plan_grid(plan);
        if (found && (last || int64_t(items_of(shape_, plan->maps)) * plan->blocks <= device_.processors)) return true;
      }
    }
    return false;
  }

 private:
  // Whether a block's threads and shared memory suffice; fills those two in.
  bool fits(CudaWalkPlan* plan) const {
    const int64_t groups = (shape_.width + Links<Weight>::kPixels - 1) / Links<Weight>::kPixels;
    const int64_t threads = rows_of(shape_, plan->blocks) * groups;
    if (threads > kMaxThreads) return false;
    plan->threads = int((threads + 31) / 32 * 32);
    const ResidentWalk walk = describe<Weight>(shape_, options_, method_, *plan);
    const int64_t shared = (int64_t(walk.stage_at) + plan->threads * kStaged<Weight>)*int64_t(sizeof(float));
    plan->shared = int(shared);
    return shared <= device_.shared;
  }

  // The fewest blocks that hold an item, and more while processors would stand idle otherwise.
  bool plan_cluster(CudaWalkPlan* plan) const {
    plan->items_at_once = items_of(shape_, plan->maps);
    const int64_t most = std::min<int64_t>(device_.clusters ? kMaxClusterBlocks : 1, shape_.height);
    bool found = false;
    CudaWalkPlan next = *plan;
    for (next.blocks = 1; next.blocks <= most; next.blocks *= 2) {
      const bool idle = int64_t(plan->items_at_once) * next.blocks <= device_.processors;
      if (found && (!idle || rows_of(shape_, next.blocks) < kLeastRows)) break;
      if (!fits(&next) || !cluster_exists<Weight>(next)) continue;
      *plan = next;
      found = true;
    }
    return found;
  }

  // The same, with one block a processor.
  bool plan_grid(CudaWalkPlan* plan) const {
    if (!device_.cooperative) return false;
    const int most = int(std::min<int64_t>(device_.processors, shape_.height));
    plan->blocks = 1;
    plan->items_at_once = 1;
    while (plan->blocks <= most && !fits(plan)) ++plan->blocks;
    if (plan->blocks > most) return false;
    plan->items_at_once = std::min(items_of(shape_, plan->maps), device_.processors / plan->blocks);
    const int64_t spread = std::min<int64_t>(device_.processors / plan->items_at_once, shape_.height / kLeastRows);
    plan->blocks = std::max(plan->blocks, int(spread));
    return fits(plan);
  }

  const WalkShape& shape_;
  const WalkOptions& options_;
  const WalkMethod& method_;
  const Device device_;
};

// The grid form's workspace; the same code counts it.
void take_workspace(const CudaWalkPlan& plan, Workspace& parts, ResidentWalk* walk) {
  if (plan.form != WalkForm::kGrid) return;
  walk->exchange = parts.take<float>(size_t(2) * plan.items_at_once * plan.maps * walk->height * walk->columns);
  walk->alive = parts.take<int>(size_t(2) * plan.items_at_once * plan.blocks);
}

template <class Weight, bool kCluster>
void launch_walk(const ResidentWalk& walk, const CudaWalkPlan& plan, cudaStream_t stream) {
  allow<Weight, kCluster>(plan);
  Launch how{dim3(unsigned(plan.blocks * plan.items_at_once)), dim3(unsigned(plan.threads)), size_t(plan.shared),
             stream};
  how.cluster = kCluster ? plan.blocks : 1;
  how.cooperative = !kCluster;
  launch("resident_walk_kernel", how, &resident_walk_kernel<Weight, kCluster>, walk);
}

template <class Weight>
void run(const float* maps, const float* affinity, float* out, const WalkShape& shape, const WalkOptions& options,
         const WalkMethod& method, const CudaWalkPlan& plan, void* workspace, cudaStream_t stream) {
  ResidentWalk walk = describe<Weight>(shape, options, method, plan);
  walk.maps = maps;
  walk.affinity = affinity;
  walk.out = out;
  Workspace parts(workspace);
  take_workspace(plan, parts, &walk);
  const auto launch = plan.form == WalkForm::kCluster ? launch_walk<Weight, true> : launch_walk<Weight, false>;
  launch(walk, plan, stream);
}

}  // namespace

bool plan_resident_walk(const WalkShape& shape, const WalkOptions& options, const WalkMethod& method,
                        CudaWalkPlan* plan) {
  const bool countable = shape.batch * shape.channels <= INT_MAX / kMaxClusterBlocks && options.steps < INT_MAX &&
                         shape.height * shape.width <= INT_MAX;
  if (options.radius != kRadius || method.in_double || !countable) return false;
  *plan = {};
  // float16 weights move the result by up to 3e-4 of the maps' maximum.
  plan->half_weights = options.solver != WalkSolver::kPower && options.tol >= 1e-3;
  const bool found = plan->half_weights ? Planner<__half>(shape, options, method).plan(plan)
                                        : Planner<float>(shape, options, method).plan(plan);
  if (!found) return false;
  ResidentWalk walk = plan->half_weights ? describe<__half>(shape, options, method, *plan)
                                         : describe<float>(shape, options, method, *plan);
  Workspace counting(nullptr);
  take_workspace(*plan, counting, &walk);
  plan->workspace = counting.bytes();
  return true;
}

void resident_walk(const float* maps, const float* affinity, float* out, const WalkShape& shape,
                   const WalkOptions& options, const WalkMethod& method, const CudaWalkPlan& plan, void* workspace,
                   cudaStream_t stream) {
  const auto walk = plan.half_weights ? run<__half> : run<float>;
  walk(maps, affinity, out, shape, options, method, plan, workspace, stream);
}

}  // namespace wsss
