// The runtime's host functions, over a device whose properties a test sets. Every launch has ended when it returns.
#pragma once
#include <cstddef>
#include <tuple>
#include <utility>

#include "vector_types.h"

#define CUDART_VERSION 13000

// The numbers are CUDA's.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};
using cudaError = cudaError_t;

using cudaStream_t = struct CUstream_st*;

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock,
  cudaDevAttrMaxBlockDimX,
  cudaDevAttrMaxBlockDimY,
  cudaDevAttrMaxBlockDimZ,
  cudaDevAttrMaxGridDimX,
  cudaDevAttrMaxGridDimY,
  cudaDevAttrMaxGridDimZ,
  cudaDevAttrMaxSharedMemoryPerBlock,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrMaxRegistersPerBlock,
  cudaDevAttrMaxRegistersPerMultiprocessor,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrMaxBlocksPerMultiprocessor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrWarpSize,
  cudaDevAttrL2CacheSize,
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrClusterLaunch,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes;
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4
};

union cudaLaunchAttributeValue {
  int cooperative;
  struct {
    unsigned x, y, z;
  } clusterDim;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

cudaError_t cudaMalloc(void** address, size_t bytes);
cudaError_t cudaFree(void* address);
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();

namespace cuda_on_cpu {

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t get_attributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t blocks_a_processor(int* count, const void* kernel, int threads, size_t shared);
cudaError_t active_clusters(int* count, const void* kernel, const cudaLaunchConfig_t* config);
cudaError_t largest_cluster(int* blocks, const void* kernel, const cudaLaunchConfig_t* config);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*run_thread)(const void* arguments),
                   const void* arguments, size_t argument_bytes);

template <class Function>
const void* address_of(Function* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

template <class... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;

  static void run_thread(const void* call) {
    const auto& self = *static_cast<const Call*>(call);
    std::apply(self.kernel, self.arguments);
  }
};

}  // namespace cuda_on_cpu

template <class T>
cudaError_t cudaMalloc(T** address, size_t bytes) {
  void* untyped = nullptr;
  const cudaError_t status = cudaMalloc(&untyped, bytes);
  *address = static_cast<T*>(untyped);
  return status;
}

template <class Function>
cudaError_t cudaFuncSetAttribute(Function* kernel, cudaFuncAttribute attribute, int value) {
  return cuda_on_cpu::set_attribute(cuda_on_cpu::address_of(kernel), attribute, value);
}
template <class Function>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Function* kernel) {
  return cuda_on_cpu::get_attributes(attributes, cuda_on_cpu::address_of(kernel));
}
template <class Function>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, Function* kernel, int threads, size_t shared) {
  return cuda_on_cpu::blocks_a_processor(count, cuda_on_cpu::address_of(kernel), threads, shared);
}
template <class Function>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Function* kernel, const cudaLaunchConfig_t* config) {
  return cuda_on_cpu::active_clusters(count, cuda_on_cpu::address_of(kernel), config);
}
template <class Function>
cudaError_t cudaOccupancyMaxPotentialClusterSize(int* blocks, Function* kernel, const cudaLaunchConfig_t* config) {
  return cuda_on_cpu::largest_cluster(blocks, cuda_on_cpu::address_of(kernel), config);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using Call = cuda_on_cpu::Call<Parameters...>;
  static_assert(sizeof(Call) <= 4096, "older devices take 4 kB of kernel parameters");
  static_assert((!std::is_reference_v<Parameters> && ...), "a kernel's parameters are values");
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "a kernel's parameters are copied as bytes");
  const Call call{kernel, {std::forward<Arguments>(arguments)...}};
  return cuda_on_cpu::launch(*config, cuda_on_cpu::address_of(kernel), &Call::run_thread, &call, sizeof call);
}
