// The walk on the GPU in one launch with the weights in registers (random_walk_resident.cu): radius 5, float32 states.
#pragma once
#include <cuda_runtime.h>

#include "random_walk.h"
#include "random_walk_series.h"

namespace wsss {

// Whether the current device can hold such a walk, and how.
bool plan_resident_walk(const WalkShape& shape, const WalkOptions& options, const WalkMethod& method,
                        CudaWalkPlan* plan);

void resident_walk(const float* maps, const float* affinity, float* out, const WalkShape& shape,
                   const WalkOptions& options, const WalkMethod& method, const CudaWalkPlan& plan, void* workspace,
                   cudaStream_t stream);

}  // namespace wsss
