// Stands in for CUDA's header where the tests compile CUDA sources for the CPU (tests/cuda/runner.py). One fiber is one
// CUDA thread; the engine in tests/cuda/engine runs them and checks every access. What is missing here does not
// compile:
// __shared__ (memory comes from wsss::block_memory), __activemask, textures, streams beyond a name.
#pragma once

#include "cuda_on_cpu/host_api.h"
#include "cuda_on_cpu/math.h"
#include "cuda_on_cpu/qualifiers.h"
#include "cuda_on_cpu/threads.h"
#include "cuda_on_cpu/vector_types.h"

// The block's dynamic shared memory, for wsss::block_memory.
void* cuda_on_cpu_block_memory();
