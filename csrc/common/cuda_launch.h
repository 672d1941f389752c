// Launching CUDA kernels: the runtime's calls in one checked form, and a block's shared memory.
// Kernels take shared memory from block_memory() only, so that the tests can run them on the CPU with every access
// seen.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

namespace wsss {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // forgotten here, or the next launch of anyone would report it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

struct Launch {
  dim3 grid, block;
  size_t shared;  // bytes of dynamic shared memory a block
  cudaStream_t stream;
  int cluster = 1;           // blocks of grid.x that share their memory (compute capability 9.0 and newer)
  bool cooperative = false;  // all blocks at once, so that they can wait for each other
};

template <class... Parameters, class... Arguments>
void launch(const char* name, const Launch& how, void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (how.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = unsigned(how.cluster);
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  if (how.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared;
  config.stream = how.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

inline int cuda_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// The block's dynamic shared memory, 16-byte aligned.
template <class T>
__device__ inline T* block_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char wsss_block_memory[];
  return reinterpret_cast<T*>(wsss_block_memory);
#else
  return static_cast<T*>(cuda_on_cpu_block_memory());
#endif
}

}  // namespace wsss
