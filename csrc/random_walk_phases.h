// The general form of the walk on the GPU (random_walk_phases.cu). All pointers are on the device.
#pragma once
#include <cuda_runtime.h>

#include "random_walk.h"
#include "random_walk_series.h"

namespace wsss {

size_t phased_walk_workspace(const WalkShape& shape, const WalkOptions& options, const WalkMethod& method);
void phased_walk(const float* maps, const float* affinity, float* out, const WalkShape& shape,
                 const WalkOptions& options, const WalkMethod& method, void* workspace, cudaStream_t stream);

size_t phased_walk_backward_workspace(const WalkShape& shape, const WalkOptions& options, bool wants_affinity);
void phased_walk_backward(const float* grad, const float* maps, const float* affinity, float* grad_maps,
                          float* grad_affinity, const WalkShape& shape, const WalkOptions& options, void* workspace,
                          cudaStream_t stream);

}  // namespace wsss
