#include "cuda_device.h"

#include <cuda_runtime_api.h>

#include <stdexcept>

namespace wsss {
namespace {

__global__ void write_compiled_arch(int* arch) {
#ifdef __CUDA_ARCH__
  *arch = __CUDA_ARCH__ / 10;
#endif
}

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // forgotten here, or the next launch of anyone would report it
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status));
}

class DeviceInt {
 public:
  DeviceInt() { check(cudaMalloc(&address_, sizeof(int)), "cudaMalloc"); }
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

int cuda_probe(void* stream) {
  const auto on_stream = static_cast<cudaStream_t>(stream);
  const DeviceInt result;
  write_compiled_arch<<<1, 1, 0, on_stream>>>(result.address());
  check(cudaGetLastError(), "launching the probe kernel");
  int arch = 0;
  check(cudaMemcpyAsync(&arch, result.address(), sizeof arch, cudaMemcpyDeviceToHost, on_stream), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(on_stream), "cudaStreamSynchronize");
  return arch;
}

}  // namespace wsss
