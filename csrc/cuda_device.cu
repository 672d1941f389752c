#include "cuda_device.h"

#include <cuda_runtime_api.h>

#include "common/cuda_launch.h"

namespace wsss {
namespace {

__global__ void write_compiled_arch(int* arch) {
#ifdef __CUDA_ARCH__
  *arch = __CUDA_ARCH__ / 10;
#endif
}

class DeviceInt {
 public:
  DeviceInt() { check_cuda(cudaMalloc(&address_, sizeof(int)), "cudaMalloc"); }
  ~DeviceInt() { cudaFree(address_); }
  DeviceInt(const DeviceInt&) = delete;
  DeviceInt& operator=(const DeviceInt&) = delete;
  int* address() const { return address_; }

 private:
  int* address_ = nullptr;
};

}  // namespace

int cuda_runtime_version() { return CUDART_VERSION; }

int cuda_device_count(std::string* message) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) {
    message->clear();
    return count;
  }
  cudaGetLastError();
  *message = cudaGetErrorString(status);
  return 0;
}

bool cuda_runs_on(int device) {
  const CudaDevice current(device);
  cudaFuncAttributes attributes;
  const bool runs = cudaFuncGetAttributes(&attributes, write_compiled_arch) == cudaSuccess;
  cudaGetLastError();
  return runs;
}

CudaDevice::CudaDevice(int index) {
  check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
  if (index != before_) check_cuda(cudaSetDevice(index), "cudaSetDevice");
}

CudaDevice::~CudaDevice() { cudaSetDevice(before_); }

int cuda_probe(void* stream) {
  const auto on_stream = static_cast<cudaStream_t>(stream);
  const DeviceInt result;
  launch("write_compiled_arch", {dim3(1), dim3(1), 0, on_stream}, write_compiled_arch, result.address());
  int arch = 0;
  check_cuda(cudaMemcpyAsync(&arch, result.address(), sizeof arch, cudaMemcpyDeviceToHost, on_stream),
             "cudaMemcpyAsync");
  check_cuda(cudaStreamSynchronize(on_stream), "cudaStreamSynchronize");
  return arch;
}

}  // namespace wsss
