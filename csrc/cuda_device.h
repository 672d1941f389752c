// What CUDA this build and this machine offer. The runtime is linked statically and finds the driver when first called,
// so a build with CUDA also loads where there is no driver.
#pragma once
#include <string>

namespace wsss {

int cuda_runtime_version();                   // 1000 major + 10 minor of the toolkit this was built with
int cuda_device_count(std::string* message);  // never throws; 0 without a usable driver, with the reason in *message

bool cuda_runs_on(int device);  // whether this build has code for it

// Makes a device current, and the former one again at the end.
class CudaDevice {
 public:
  explicit CudaDevice(int index);
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

 private:
  int before_;
};

// Runs a kernel on the current device and gives back the architecture its code was compiled for: 10 times the compute
// capability, such as 90. Waits for the stream (a cudaStream_t, null for the default). std::runtime_error where the
// device is missing or older than every architecture of this build.
int cuda_probe(void* stream);

}  // namespace wsss
