#include "cuda_on_cpu/shim.h"
#include "random_walk.h"

using namespace wsss;

#define PROBLEM                                                                                               \
  int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t radius, double beta, int64_t steps, \
      int64_t solver, double tol
#define SHAPE_OPTIONS \
  WalkShape{batch, channels, height, width}, WalkOptions { int(radius), beta, steps, WalkSolver(solver), tol }

// values: the plan's form, workspace in bytes, maps an item, blocks, items at once, whether the weights are float16
EXPORTED plan(PROBLEM, int64_t* values) {
  return cuda_on_cpu::message_of([&] {
    const CudaWalkPlan plan = plan_random_walk_cuda(SHAPE_OPTIONS);
    values[0] = int64_t(plan.form);
    values[1] = int64_t(plan.workspace);
    values[2] = plan.maps;
    values[3] = plan.blocks;
    values[4] = plan.items_at_once;
    values[5] = plan.half_weights;
  });
}

EXPORTED forward(const float* maps, const float* affinity, float* out, PROBLEM, void* workspace) {
  return cuda_on_cpu::message_of([&] {
    random_walk_cuda(maps, affinity, out, SHAPE_OPTIONS, plan_random_walk_cuda(SHAPE_OPTIONS), workspace, nullptr);
  });
}

EXPORTED backward_workspace(PROBLEM, int64_t wants_affinity, int64_t* bytes) {
  return cuda_on_cpu::message_of(
      [&] { *bytes = int64_t(random_walk_backward_cuda_workspace(SHAPE_OPTIONS, wants_affinity != 0)); });
}

EXPORTED backward(const float* grad, const float* maps, const float* affinity, float* grad_maps, float* grad_affinity,
                  PROBLEM, void* workspace) {
  return cuda_on_cpu::message_of([&] {
    random_walk_backward_cuda(grad, maps, affinity, grad_maps, grad_affinity, SHAPE_OPTIONS, workspace, nullptr);
  });
}
