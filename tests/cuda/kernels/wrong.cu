// Kernels with one mistake each, which the runner must report.
#include <cooperative_groups.h>

#include <cstring>

#include "common/cuda_launch.h"
#include "cuda_on_cpu/shim.h"

namespace {

namespace cg = cooperative_groups;
using wsss::block_memory;

struct Memory {
  const float* input;
  float *out, *workspace;
  int count;  // of `out` and of `input`
};

__global__ void no_block_barrier(Memory memory) {
  float* const shared = block_memory<float>();
  shared[threadIdx.x] = 1;
  memory.out[threadIdx.x] = shared[(threadIdx.x + 32) % blockDim.x];
}

__global__ void no_barrier_before_next_write(Memory memory) {
  float* const shared = block_memory<float>();
  for (int round = 0; round < 2; ++round) {
    shared[threadIdx.x] = float(round);
    __syncthreads();
    memory.out[threadIdx.x] = shared[(threadIdx.x + 32) % blockDim.x];
  }
}

__global__ void no_warp_barrier(Memory memory) {
  float* const shared = block_memory<float>();
  shared[threadIdx.x] = 1;
  memory.out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void shuffle_for_barrier(Memory memory) {
  float* const shared = block_memory<float>();
  shared[threadIdx.x] = 1;
  const float other = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  memory.out[threadIdx.x] = other + shared[threadIdx.x ^ 1];
}

__global__ void barrier_of_other_lanes(Memory memory) {
  float* const shared = block_memory<float>();
  shared[threadIdx.x] = 1;
  __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  memory.out[threadIdx.x] = shared[threadIdx.x ^ 16];
}

__global__ void no_cluster_barrier(Memory memory) {
  const auto cluster = cg::this_cluster();
  float* const shared = block_memory<float>();
  cluster.sync();
  shared[threadIdx.x] = 1;
  __syncthreads();
  memory.out[blockIdx.x * blockDim.x + threadIdx.x] =
      cluster.map_shared_rank(shared, cluster.block_rank() ^ 1)[threadIdx.x];
  cluster.sync();
}

__global__ void written_after_arrival(Memory memory) {
  const auto cluster = cg::this_cluster();
  float* const shared = block_memory<float>();
  auto token = cluster.barrier_arrive();
  shared[threadIdx.x] = 1;
  cluster.barrier_wait(std::move(token));
  memory.out[blockIdx.x * blockDim.x + threadIdx.x] =
      cluster.map_shared_rank(shared, cluster.block_rank() ^ 1)[threadIdx.x];
  cluster.sync();
}

__global__ void no_barrier_at_start(Memory memory) {
  const auto cluster = cg::this_cluster();
  float* const shared = block_memory<float>();
  cluster.map_shared_rank(shared, cluster.block_rank() ^ 1)[threadIdx.x] = 1;
  cluster.sync();
  memory.out[blockIdx.x * blockDim.x + threadIdx.x] = shared[threadIdx.x];
}

__global__ void no_barrier_at_exit(Memory memory) {
  const auto cluster = cg::this_cluster();
  float* const shared = block_memory<float>();
  shared[threadIdx.x] = 1;
  cluster.sync();
  memory.out[blockIdx.x * blockDim.x + threadIdx.x] =
      cluster.map_shared_rank(shared, cluster.block_rank() ^ 1)[threadIdx.x];
}

__global__ void other_cluster(Memory memory) {
  const auto cluster = cg::this_cluster();
  float* const shared = block_memory<float>();
  shared[threadIdx.x] = 1;
  cluster.sync();
  memory.out[threadIdx.x] = cluster.map_shared_rank(shared, int(cluster.num_blocks()))[threadIdx.x];
}

__global__ void no_grid_barrier(Memory memory) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  memory.workspace[i] = 1;
  __syncthreads();
  memory.out[i] = memory.workspace[memory.count - 1 - i];
}

__global__ void grid_barrier_without_launch(Memory memory) {
  cg::this_grid().sync();
  memory.out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

__global__ void two_writers(Memory memory) { memory.out[0] = 1; }

__global__ void atomic_and_plain(Memory memory) {
  int* const counter = reinterpret_cast<int*>(memory.workspace);
  if (threadIdx.x == 0 && blockIdx.x == 0) *counter = 0;
  atomicAdd(counter, 1);
}

__global__ void past_tensor(Memory memory) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  memory.out[i] = i <= memory.count ? memory.input[i + 1] : 0;
}

__global__ void before_tensor(Memory memory) { memory.out[threadIdx.x] = memory.input[int(threadIdx.x) - 1]; }

__global__ void vector_past_tensor(Memory memory) {
  reinterpret_cast<float4*>(memory.out)[threadIdx.x] = make_float4(1, 2, 3, 4);
}

__global__ void past_shared(Memory memory) {
  block_memory<float>()[threadIdx.x + 1] = 1;
  memory.out[threadIdx.x] = 1;
}

__global__ void memory_of_the_host(Memory memory) { memory.out[threadIdx.x] = *memory.workspace; }

__global__ void index_of_array(Memory memory) {
  int numbers[4] = {};
  for (int i = 0; i < 4; ++i) numbers[i] = memory.count + i;
  memory.out[threadIdx.x] = float(numbers[threadIdx.x % 5]);
}

__global__ void unwritten_shared(Memory memory) {
  float* const shared = block_memory<float>();
  if (threadIdx.x != 7) shared[threadIdx.x] = 1;
  __syncthreads();
  memory.out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void unwritten_workspace(Memory memory) { memory.out[threadIdx.x] = memory.workspace[threadIdx.x]; }

__global__ void unwritten_output(Memory memory) {
  if (threadIdx.x != 3) memory.out[threadIdx.x] = 1;
}

__global__ void copied_past_tensor(Memory memory) {
  if (threadIdx.x == 0) std::memcpy(memory.out, memory.input, size_t(memory.count + 1) * sizeof(float));
}

__global__ void divergent_block_barrier(Memory memory) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  memory.out[threadIdx.x] = 1;
}

__global__ void two_kinds_of_barrier(Memory memory) {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    memory.out[0] = float(__syncthreads_or(1));
  }
}

__global__ void divergent_warp_barrier(Memory memory) {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  memory.out[threadIdx.x] = 1;
}

__global__ void divergent_grid_barrier(Memory memory) {
  if (blockIdx.x == 0) cg::this_grid().sync();
  memory.out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

__global__ void divergent_cluster_barrier(Memory memory) {
  if (cg::this_cluster().block_rank() == 1) return;
  cg::this_cluster().sync();
  memory.out[threadIdx.x] = 1;
}

__global__ void endless_wait(Memory memory) {
  volatile float* const flag = memory.out;
  if (threadIdx.x == 0) *flag = 0;
  __syncthreads();
  while (*flag == 0) __nanosleep(100);
}

__global__ void lane_that_is_not_there(Memory memory) {
  memory.out[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1.0f, 16);
}

__global__ void mask_without_itself(Memory memory) { memory.out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 0); }

__global__ void misaligned_vector(Memory memory) {
  const float4 four = *reinterpret_cast<const float4*>(memory.input + 1);
  memory.out[threadIdx.x] = four.x + four.w;
}

__global__ void write_to_input(Memory memory) { const_cast<float*>(memory.input)[threadIdx.x] = 1; }

__global__ void integer_overflow(Memory memory) { memory.out[threadIdx.x] = float((memory.count + 2147483600) % 7); }

struct Wrong {
  const char* name;
  void (*kernel)(Memory);
  int cluster;
  bool cooperative;
};

#define WRONG(name, ...) {#name, name, __VA_ARGS__}
const Wrong kAll[] = {
    WRONG(no_block_barrier, 1, false),
    WRONG(no_barrier_before_next_write, 1, false),
    WRONG(no_warp_barrier, 1, false),
    WRONG(shuffle_for_barrier, 1, false),
    WRONG(barrier_of_other_lanes, 1, false),
    WRONG(no_cluster_barrier, 2, false),
    WRONG(written_after_arrival, 2, false),
    WRONG(no_barrier_at_start, 2, false),
    WRONG(no_barrier_at_exit, 2, false),
    WRONG(other_cluster, 2, false),
    WRONG(no_grid_barrier, 1, true),
    WRONG(grid_barrier_without_launch, 1, false),
    WRONG(two_writers, 1, false),
    WRONG(atomic_and_plain, 1, false),
    WRONG(past_tensor, 1, false),
    WRONG(before_tensor, 1, false),
    WRONG(vector_past_tensor, 1, false),
    WRONG(past_shared, 1, false),
    WRONG(memory_of_the_host, 1, false),
    WRONG(index_of_array, 1, false),
    WRONG(unwritten_shared, 1, false),
    WRONG(unwritten_workspace, 1, false),
    WRONG(unwritten_output, 1, false),
    WRONG(copied_past_tensor, 1, false),
    WRONG(divergent_block_barrier, 1, false),
    WRONG(two_kinds_of_barrier, 1, false),
    WRONG(divergent_warp_barrier, 1, false),
    WRONG(divergent_grid_barrier, 1, true),
    WRONG(divergent_cluster_barrier, 2, false),
    WRONG(endless_wait, 1, false),
    WRONG(lane_that_is_not_there, 1, false),
    WRONG(mask_without_itself, 1, false),
    WRONG(misaligned_vector, 1, false),
    WRONG(write_to_input, 1, false),
    WRONG(integer_overflow, 1, false),
};

}  // namespace

EXPORTED run_wrong(const char* name, const float* input, float* out, float* workspace, int64_t count, int64_t blocks,
                   int64_t threads) {
  return cuda_on_cpu::message_of([&] {
    for (const Wrong& wrong : kAll) {
      if (std::strcmp(wrong.name, name) != 0) continue;
      wsss::Launch how{dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(threads) * sizeof(float), nullptr};
      how.cluster = wrong.cluster;
      how.cooperative = wrong.cooperative;
      float host = 1;
      return wsss::launch(name, how, wrong.kernel, Memory{input, out, workspace ? workspace : &host, int(count)});
    }
    throw std::invalid_argument(name);
  });
}
