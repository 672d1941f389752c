// Kernels without a mistake, for the tests of the runner: one for each thing that it must be able to run.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/cuda_launch.h"
#include "cuda_on_cpu/shim.h"

namespace {

namespace cg = cooperative_groups;
using wsss::block_memory;

// sums[block] of the block's share of `values`
__global__ void __launch_bounds__(256) sum(const float* values, float* sums, int count) {
  float total = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) total += values[i];
  for (int step = 16; step > 0; step /= 2) total += __shfl_down_sync(0xffffffffu, total, step);
  float* const of_warps = block_memory<float>();
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int warps = int(blockDim.x) / 32;
  total = int(threadIdx.x) < warps ? of_warps[threadIdx.x] : 0.0f;
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// Means of 3x3 pixels, 0 outside; a tile with its border in shared memory.
__global__ void box_filter(const float* image, float* out, int height, int width) {
  const int pitch = int(blockDim.x) + 2, top = blockIdx.y * blockDim.y - 1, left = blockIdx.x * blockDim.x - 1;
  float* const tile = block_memory<float>();
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < pitch * (int(blockDim.y) + 2);
       i += blockDim.x * blockDim.y) {
    const int y = top + i / pitch, x = left + i % pitch;
    tile[i] = y >= 0 && y < height && x >= 0 && x < width ? __ldg(image + y * width + x) : 0.0f;
  }
  __syncthreads();
  const int y = top + 1 + int(threadIdx.y), x = left + 1 + int(threadIdx.x);
  if (y >= height || x >= width) return;
  float total = 0;
  for (int dy = 0; dy < 3; ++dy) {
    for (int dx = 0; dx < 3; ++dx) total += tile[(threadIdx.y + dy) * pitch + threadIdx.x + dx];
  }
  out[y * width + x] = total / 9;
}

// out[i] = values[i - 1] + values[i + 1] within each cluster's share, which is a ring.
__global__ void ring(const float4* values, float* out, bool split_barrier) {
  const auto cluster = cg::this_cluster();
  const int rank = int(cluster.block_rank()), blocks = int(cluster.num_blocks()), last = 4 * int(blockDim.x) - 1;
  float* const own = block_memory<float>();
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  reinterpret_cast<float4*>(own)[threadIdx.x] = values[at];
  if (split_barrier) {
    auto token = cluster.barrier_arrive();
    out[4 * at] = 0;  // needs nobody
    cluster.barrier_wait(std::move(token));
  } else {
    cluster.sync();
  }
  for (int i = 4 * int(threadIdx.x); i < 4 * int(threadIdx.x) + 4; ++i) {
    const float before = i > 0 ? own[i - 1] : cluster.map_shared_rank(own, (rank + blocks - 1) % blocks)[last];
    const float after = i < last ? own[i + 1] : *cluster.map_shared_rank(own, (rank + 1) % blocks);
    out[blockIdx.x * (last + 1) + i] = before + after;
  }
  cluster.sync();  // nobody exits while others read
}

// `steps` times x[i] <- mean of its two neighbours, the ends stay.
__global__ void smooth(const float* from, float* first, float* second, int count, int steps) {
  const auto grid = cg::this_grid();
  const int stride = int(grid.num_threads());
  for (int i = int(grid.thread_rank()); i < count; i += stride) first[i] = from[i];
  for (int step = 0; step < steps; ++step) {
    grid.sync();
    const float* const now = step % 2 ? second : first;
    float* const next = step % 2 ? first : second;
    for (int i = int(grid.thread_rank()); i < count; i += stride) {
      next[i] = i == 0 || i == count - 1 ? now[i] : 0.5f * (now[i - 1] + now[i + 1]);
    }
  }
}

__global__ void histogram(const int* values, int count, int* bins, int* largest, unsigned* tickets, float* product) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  atomicAdd(&bins[values[i]], 1);
  atomicMax(largest, values[i]);
  atomicOr(&tickets[i / 32], 1u << i % 32);
  int* const bits = reinterpret_cast<int*>(product);
  for (int before = atomicAdd(bits, 0), assumed = ~before; before != assumed;) {
    assumed = before;
    before = atomicCAS(bits, assumed, __float_as_int(__int_as_float(assumed) * 2));
  }
}

// One bit pattern a thread: its value, and the value rounded back.
template <class T>
__global__ void convert_all(const T* patterns, float* values, T* rounded) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  values[i] = float(patterns[i]);
  rounded[i] = T(values[i]);
}

template <class T>
__global__ void round_all(const float* values, T* rounded) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  rounded[i] = T(values[i]);
}

__global__ void halves_in_pairs(const __half2* a, const __half2* b, __half2* product, float2* sum) {
  const int i = threadIdx.x;
  product[i] = __hmul2(a[i], b[i]);
  const float2 x = __half22float2(a[i]), y = __half22float2(b[i]);
  sum[i] = make_float2(x.x + __low2float(b[i]), x.y + y.y);
}

// What each thread of one block of 64 is told by votes and by part of its warp: 8 numbers.
__global__ void votes(int* told) {
  const int rank = threadIdx.x, lane = rank % 32;
  int* const own = told + 8 * rank;
  own[0] = __syncthreads_count(rank % 3 == 0);
  own[1] = __syncthreads_or(rank == 40);
  own[2] = __syncthreads_and(rank != 40);
  own[3] = int(__ballot_sync(0xffffffffu, rank % 5 == 0));
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  own[4] = lane < 16 ? __shfl_up_sync(half, rank, 3, 8) : __shfl_sync(half, rank, 1, 16);
  own[5] = int(__reduce_add_sync(half, unsigned(rank)));
  own[6] = __any_sync(half, rank == 20) + 2 * __all_sync(half, rank < 32);
  const auto tile = cg::tiled_partition<8>(cg::this_thread_block());
  own[7] = tile.shfl_xor(rank, 1) + 1000 * int(tile.meta_group_rank()) + 100000 * int(tile.ballot(lane % 2));
}

// Lanes pass a number on through shared memory, in pairs that meet by themselves.
__global__ void pairs(int* out) {
  int* const numbers = block_memory<int>();
  const int lane = threadIdx.x;
  const unsigned pair = 3u << (lane & ~1);
  numbers[lane] = 10 * lane;
  __syncwarp(pair);
  out[lane] = numbers[lane ^ 1];
}

// A block waits for a number of the block after it.
__global__ void wait_in_turn(int* turn) {
  volatile int* const seen = turn;
  while (*seen != int(gridDim.x - 1 - blockIdx.x)) __nanosleep(20);
  atomicAdd(turn, 1);
}

__global__ void barriers(int count) {
  for (int i = 0; i < count; ++i) __syncthreads();
}

template <class Kernel, class... Arguments>
const char* run(const char* name, wsss::Launch how, Kernel kernel, Arguments... arguments) {
  return cuda_on_cpu::message_of([&] { wsss::launch(name, how, kernel, arguments...); });
}

wsss::Launch shape(int64_t blocks, int64_t threads, size_t shared = 0) {
  return {dim3(unsigned(blocks)), dim3(unsigned(threads)), shared, nullptr};
}

}  // namespace

EXPORTED run_sum(const float* values, float* sums, int64_t count, int64_t blocks, int64_t threads) {
  return run("sum", shape(blocks, threads, 32 * sizeof(float)), sum, values, sums, count);
}

EXPORTED run_box_filter(const float* image, float* out, int64_t height, int64_t width) {
  wsss::Launch how = shape((width + 15) / 16, 16, 18 * 10 * sizeof(float));
  how.grid.y = unsigned((height + 7) / 8);
  how.block.y = 8;
  return run("box_filter", how, box_filter, image, out, height, width);
}

EXPORTED run_ring(const float* values, float* out, int64_t blocks, int64_t threads, int64_t cluster, int64_t split) {
  wsss::Launch how = shape(blocks, threads, size_t(16 * threads));
  how.cluster = int(cluster);
  return run("ring", how, ring, reinterpret_cast<const float4*>(values), out, split != 0);
}

EXPORTED run_large_ring(const float* values, float* out, int64_t blocks, int64_t shared) {
  return cuda_on_cpu::message_of([&] {
    wsss::check_cuda(cudaFuncSetAttribute(ring, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster");
    wsss::check_cuda(cudaFuncSetAttribute(ring, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "shared");
    wsss::Launch how = shape(blocks, 32, size_t(shared));
    how.cluster = int(blocks);
    wsss::launch("ring", how, ring, reinterpret_cast<const float4*>(values), out, false);
  });
}

EXPORTED run_smooth(const float* from, float* first, float* second, int64_t count, int64_t steps, int64_t blocks,
                    int64_t cooperative) {
  wsss::Launch how = shape(blocks, 32);
  how.cooperative = cooperative != 0;
  return run("smooth", how, smooth, from, first, second, count, steps);
}

EXPORTED run_histogram(const int* values, int64_t count, int* bins, int* largest, unsigned* tickets, float* product) {
  return run("histogram", shape((count + 63) / 64, 64), histogram, values, count, bins, largest, tickets, product);
}

EXPORTED run_convert_halves(const __half* patterns, float* values, __half* rounded) {
  return run("convert_all", shape(256, 256), convert_all<__half>, patterns, values, rounded);
}

EXPORTED run_convert_bfloat16s(const __nv_bfloat16* patterns, float* values, __nv_bfloat16* rounded) {
  return run("convert_all", shape(256, 256), convert_all<__nv_bfloat16>, patterns, values, rounded);
}

EXPORTED run_round_halves(const float* values, __half* rounded, int64_t blocks) {
  return run("round_all", shape(blocks, 128), round_all<__half>, values, rounded);
}

EXPORTED run_round_bfloat16s(const float* values, __nv_bfloat16* rounded, int64_t blocks) {
  return run("round_all", shape(blocks, 128), round_all<__nv_bfloat16>, values, rounded);
}

EXPORTED run_halves_in_pairs(const __half2* a, const __half2* b, __half2* product, float2* sum, int64_t count) {
  return run("halves_in_pairs", shape(1, count), halves_in_pairs, a, b, product, sum);
}

EXPORTED run_votes(int* told) { return run("votes", shape(1, 64), votes, told); }

EXPORTED run_pairs(int* out) { return run("pairs", shape(1, 32, 32 * sizeof(int)), pairs, out); }

EXPORTED run_wait_in_turn(int* turn, int64_t blocks) {
  wsss::Launch how = shape(blocks, 1);
  how.cooperative = true;
  return run("wait_in_turn", how, wait_in_turn, turn);
}

EXPORTED run_barriers(int64_t blocks, int64_t threads, int64_t count) {
  return run("barriers", shape(blocks, threads), barriers, count);
}

// A launch of any shape, which the device may refuse.
EXPORTED run_shape(int64_t x, int64_t y, int64_t z, int64_t threads, int64_t shared, int64_t cluster,
                   int64_t cooperative) {
  wsss::Launch how{dim3(unsigned(x), unsigned(y), unsigned(z)), dim3(unsigned(threads)), size_t(shared), nullptr};
  how.cluster = int(cluster);
  how.cooperative = cooperative != 0;
  return run("barriers", how, barriers, 1);
}

EXPORTED blocks_a_processor(int64_t threads, int64_t shared, int64_t* blocks) {
  return cuda_on_cpu::message_of([&] {
    int count = 0;
    wsss::check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, barriers, int(threads), size_t(shared)), "");
    *blocks = count;
  });
}

EXPORTED fill_and_copy(float* from, float* to, int64_t bytes) {
  return cuda_on_cpu::message_of([&] {
    wsss::check_cuda(cudaMemsetAsync(from, 0, size_t(bytes), nullptr), "cudaMemsetAsync");
    wsss::check_cuda(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToDevice, nullptr), "cudaMemcpyAsync");
  });
}
