#include <cuda_runtime.h>

#include "common/cuda_launch.h"
#include "common/neighbourhood.h"
#include "random_walk_phases.h"
#include "random_walk_resident.h"

namespace wsss {

namespace {

bool empty(const WalkShape& shape) { return shape.batch * shape.channels * shape.height * shape.width == 0; }

size_t map_bytes(const WalkShape& shape) {
  return size_t(shape.batch) * shape.channels * shape.height * shape.width * sizeof(float);
}

void copy(float* to, const float* from, size_t bytes, cudaStream_t stream) {
  check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
}

}  // namespace

CudaWalkPlan plan_random_walk_cuda(WalkShape shape, const WalkOptions& options) {
  CudaWalkPlan plan = {};
  plan.form = WalkForm::kPhases;
  if (empty(shape) || options.steps == 0) return plan;
  const WalkMethod method = choose_walk_method(options);
  CudaWalkPlan resident;
  if (plan_resident_walk(shape, options, method, &resident)) return resident;
  plan.workspace = phased_walk_workspace(shape, options, method);
  return plan;
}

void random_walk_cuda(const float* maps, const float* affinity, float* out, WalkShape shape, const WalkOptions& options,
                      const CudaWalkPlan& plan, void* workspace, void* stream) {
  const auto on_stream = static_cast<cudaStream_t>(stream);
  if (empty(shape)) return;
  if (options.steps == 0) return copy(out, maps, map_bytes(shape), on_stream);
  const WalkMethod method = choose_walk_method(options);
  if (plan.form == WalkForm::kPhases) {
    phased_walk(maps, affinity, out, shape, options, method, workspace, on_stream);
  } else {
    resident_walk(maps, affinity, out, shape, options, method, plan, workspace, on_stream);
  }
}

size_t random_walk_backward_cuda_workspace(WalkShape shape, const WalkOptions& options, bool wants_affinity) {
  if (empty(shape) || options.steps == 0) return 0;
  return phased_walk_backward_workspace(shape, options, wants_affinity);
}

void random_walk_backward_cuda(const float* grad, const float* maps, const float* affinity, float* grad_maps,
                               float* grad_affinity, WalkShape shape, const WalkOptions& options, void* workspace,
                               void* stream) {
  const auto on_stream = static_cast<cudaStream_t>(stream);
  if (empty(shape) || options.steps == 0) {
    const size_t links = size_t(shape.batch) * neighbour_count(options.radius) * shape.height * shape.width;
    if (grad_affinity && links > 0) {
      check_cuda(cudaMemsetAsync(grad_affinity, 0, links * sizeof(float), on_stream), "cudaMemsetAsync");
    }
    if (grad_maps && !empty(shape)) copy(grad_maps, grad, map_bytes(shape), on_stream);
    return;
  }
  phased_walk_backward(grad, maps, affinity, grad_maps, grad_affinity, shape, options, workspace, on_stream);
}

}  // namespace wsss
