// What a chain of steps costs that wait for each other and do nothing else: a launch a step, a barrier of the grid, a
// barrier of a cluster. No walk is faster than its form's.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace {

__global__ void step() {}

__global__ void grid_steps(int steps) {
  for (int i = 0; i < steps; ++i) cooperative_groups::this_grid().sync();
}

__global__ void cluster_steps(int steps) {
#if __CUDA_ARCH__ >= 900
  for (int i = 0; i < steps; ++i) cooperative_groups::this_cluster().sync();
#else
  (void)steps;  // never launched: these devices have no clusters
#endif
}

}  // namespace

// The CUDA error. kind: 0 launches, 1 barriers of the grid, 2 of one cluster of `blocks`.
extern "C" int step_chain(int kind, int steps, int blocks, int threads, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  cudaGetLastError();  // of an earlier call that was refused
  if (kind == 0) {
    for (int i = 0; i < steps; ++i) step<<<blocks, threads, 0, stream>>>();
    return cudaGetLastError();
  }
  void* arguments[] = {&steps};
  if (kind == 1) {
    return cudaLaunchCooperativeKernel(grid_steps, dim3(blocks), dim3(threads), arguments, 0, stream);
  }
  cudaError_t error = cudaFuncSetAttribute(cluster_steps, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, cluster_steps, steps);
}
