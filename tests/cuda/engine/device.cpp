// The device that launches are checked against, the runtime's host functions, and what Python calls.
#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <utility>

#include "cuda_on_cpu/host_api.h"
#include "grid.h"
#include "memory.h"

namespace cuda_on_cpu {
namespace {

constexpr int kSharedWithoutAsking = 48 * 1024;
constexpr int kReservedShared = 1024;
constexpr int kPortableCluster = 8;
constexpr int kRegisters = 65536;  // of a processor

// An H100's figures; a test sets its own.
struct Device {
  int64_t sm_count = 132, shared_per_block = 232448, shared_per_sm = 233472, threads_per_sm = 2048, blocks_per_sm = 32;
  int64_t max_threads = 1024, registers = 64, capability = 90, clusters = 1, max_cluster = 16, cooperative = 1;
  int64_t order = 0, seed = 0;
};

Device device;

struct KernelAttributes {
  int shared = kSharedWithoutAsking;
  bool large_clusters = false;
};

std::map<const void*, KernelAttributes> kernel_attributes;
cudaError_t last_error = cudaSuccess;
std::string launches;

cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

struct Setting {
  const char* name;
  int64_t Device::* value;
};

constexpr Setting kSettings[] = {
    {"sm_count", &Device::sm_count},
    {"shared_per_block", &Device::shared_per_block},
    {"shared_per_sm", &Device::shared_per_sm},
    {"threads_per_sm", &Device::threads_per_sm},
    {"blocks_per_sm", &Device::blocks_per_sm},
    {"max_threads", &Device::max_threads},
    {"registers", &Device::registers},
    {"capability", &Device::capability},
    {"clusters", &Device::clusters},
    {"max_cluster", &Device::max_cluster},
    {"cooperative", &Device::cooperative},
    {"order", &Device::order},
    {"seed", &Device::seed},
};

int64_t blocks_on_one(int threads, size_t shared) {
  const int64_t warps = (threads + kLanes - 1) / kLanes;
  int64_t blocks = std::min(device.blocks_per_sm, device.threads_per_sm / (warps * kLanes));
  blocks = std::min(blocks, kRegisters / (device.registers * warps * kLanes));
  return std::min(blocks, device.shared_per_sm / int64_t(shared + kReservedShared));
}

struct Form {
  dim3 cluster{1, 1, 1};
  bool clustered = false, cooperative = false;
  unsigned blocks() const { return cluster.x * cluster.y * cluster.z; }
};

Form form_of(const cudaLaunchConfig_t& config) {
  Form form;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      form.cluster = {attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z};
      form.clustered = true;
    }
    if (attribute.id == cudaLaunchAttributeCooperative) form.cooperative = attribute.val.cooperative != 0;
  }
  return form;
}

cudaError_t check_block(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3& block = config.blockDim;
  const int64_t threads = int64_t(block.x) * block.y * block.z;
  if (threads == 0 || block.x > 1024 || block.y > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  if (threads > device.max_threads) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > size_t(kernel_attributes[kernel].shared)) return cudaErrorInvalidValue;
  if (config.dynamicSmemBytes > size_t(device.shared_per_block)) return cudaErrorInvalidValue;
  return blocks_on_one(int(threads), config.dynamicSmemBytes) > 0 ? cudaSuccess : cudaErrorLaunchOutOfResources;
}

cudaError_t check_cluster(const Form& form, const cudaLaunchConfig_t& config, const void* kernel) {
  if (!form.clustered) return cudaSuccess;
  if (!device.clusters) return cudaErrorNotSupported;
  const dim3 &grid = config.gridDim, &cluster = form.cluster;
  if (form.blocks() == 0) return cudaErrorInvalidClusterSize;
  if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) return cudaErrorInvalidClusterSize;
  const int64_t most = kernel_attributes[kernel].large_clusters
                           ? device.max_cluster
                           : std::min<int64_t>(kPortableCluster, device.max_cluster);
  return form.blocks() <= most ? cudaSuccess : cudaErrorInvalidClusterSize;
}

cudaError_t check_launch(const Form& form, const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3& grid = config.gridDim;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaErrorInvalidConfiguration;
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = check_block(config, kernel)) return error;
  if (const cudaError_t error = check_cluster(form, config, kernel)) return error;
  if (!form.cooperative) return cudaSuccess;
  if (!device.cooperative) return cudaErrorNotSupported;
  const dim3& block = config.blockDim;
  const int64_t at_once = blocks_on_one(int(block.x * block.y * block.z), config.dynamicSmemBytes) * device.sm_count;
  const int64_t wanted = int64_t(grid.x) * grid.y * grid.z;
  return wanted <= at_once ? cudaSuccess : cudaErrorCooperativeLaunchTooLarge;
}

void note_launch(const Launching& how, cudaStream_t stream, const Barriers& barriers) {
  char line[400];
  std::snprintf(line, sizeof line, "%x %u %u %u %u %u %u %u %d %zu %llu %llu %llu %llu\n", relative(how.kernel),
                how.grid.x, how.grid.y, how.grid.z, how.block.x, how.block.y, how.block.z, how.cluster_blocks,
                int(how.cooperative), how.shared, static_cast<unsigned long long>(barriers.block),
                static_cast<unsigned long long>(barriers.cluster), static_cast<unsigned long long>(barriers.grid),
                static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(stream)));
  launches += line;
}

// A copy's or fill's end on the device; null where the range belongs to no buffer.
Region* range(const void* address, size_t bytes) {
  Region* const region = region_at(address);
  if (!region || size_t(static_cast<const unsigned char*>(address) - region->begin) + bytes > region->bytes)
    return nullptr;
  return region;
}

void set_written(Region& region, const void* address, size_t bytes, const Region* from, const void* from_address) {
  bool* const written = region.written + (static_cast<const unsigned char*>(address) - region.begin);
  if (from) {
    std::memmove(written, from->written + (static_cast<const unsigned char*>(from_address) - from->begin), bytes);
  } else {
    std::memset(written, 1, bytes);
  }
}

}  // namespace

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  KernelAttributes& attributes = kernel_attributes[kernel];
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > device.shared_per_block) return failed(cudaErrorInvalidValue);
    attributes.shared = value;
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    if (!device.clusters) return failed(cudaErrorNotSupported);
    attributes.large_clusters = value != 0;
  }
  return cudaSuccess;
}

cudaError_t get_attributes(cudaFuncAttributes* attributes, const void* kernel) {
  *attributes = {};
  attributes->maxThreadsPerBlock = int(device.max_threads);
  attributes->numRegs = int(device.registers);
  attributes->ptxVersion = attributes->binaryVersion = int(device.capability);
  attributes->maxDynamicSharedSizeBytes = kernel_attributes[kernel].shared;
  return cudaSuccess;
}

cudaError_t blocks_a_processor(int* count, const void* kernel, int threads, size_t shared) {
  *count = 0;
  if (threads <= 0) return failed(cudaErrorInvalidValue);
  if (threads <= device.max_threads && shared <= size_t(kernel_attributes[kernel].shared)) {
    *count = int(blocks_on_one(threads, shared));
  }
  return cudaSuccess;
}

cudaError_t active_clusters(int* count, const void* kernel, const cudaLaunchConfig_t* config) {
  *count = 0;
  const Form form = form_of(*config);
  if (const cudaError_t error = check_cluster(form, *config, kernel)) return failed(error);
  if (const cudaError_t error = check_block(*config, kernel)) return failed(error);
  const dim3& block = config->blockDim;
  const int64_t at_once = blocks_on_one(int(block.x * block.y * block.z), config->dynamicSmemBytes) * device.sm_count;
  *count = int(at_once / form.blocks());
  return cudaSuccess;
}

cudaError_t largest_cluster(int* blocks, const void* kernel, const cudaLaunchConfig_t* config) {
  *blocks = 0;
  if (!device.clusters) return failed(cudaErrorNotSupported);
  if (const cudaError_t error = check_block(*config, kernel)) return failed(error);
  const int64_t allowed = kernel_attributes[kernel].large_clusters ? device.max_cluster : kPortableCluster;
  *blocks = int(std::min({allowed, device.max_cluster, device.sm_count}));
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*run_thread)(const void*),
                   const void* arguments, size_t argument_bytes) {
  const Form form = form_of(config);
  if (const cudaError_t error = check_launch(form, config, kernel)) return failed(error);
  Launching how = {};
  how.kernel = kernel;
  how.run_thread = run_thread;
  how.arguments = arguments;
  how.argument_bytes = argument_bytes;
  how.grid = config.gridDim;
  how.block = config.blockDim;
  how.cluster = form.cluster;
  how.blocks = how.grid.x * how.grid.y * how.grid.z;
  how.threads = how.block.x * how.block.y * how.block.z;
  how.cluster_blocks = form.blocks();
  how.cooperative = form.cooperative;
  how.shared = config.dynamicSmemBytes;
  Barriers barriers = {};
  const bool finished = run_grid(how, Order(device.order), uint32_t(device.seed), &barriers);
  note_launch(how, config.stream, barriers);
  return finished ? cudaSuccess : failed(cudaErrorLaunchFailure);
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorInvalidClusterSize: return "cudaErrorInvalidClusterSize";
  }
  return "cudaErrorUnknown";
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* index) { return *index = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int index) { return index == 0 ? cudaSuccess : failed(cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (index != 0) return failed(cudaErrorInvalidDevice);
  const int64_t found = [attribute]() -> int64_t {
    switch (attribute) {
      case cudaDevAttrMaxThreadsPerBlock: return device.max_threads;
      case cudaDevAttrMaxBlockDimX:
      case cudaDevAttrMaxBlockDimY: return 1024;
      case cudaDevAttrMaxBlockDimZ: return 64;
      case cudaDevAttrMaxGridDimX: return INT32_MAX;
      case cudaDevAttrMaxGridDimY:
      case cudaDevAttrMaxGridDimZ: return 65535;
      case cudaDevAttrMaxSharedMemoryPerBlock: return kSharedWithoutAsking;
      case cudaDevAttrMaxSharedMemoryPerBlockOptin: return device.shared_per_block;
      case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return device.shared_per_sm;
      case cudaDevAttrReservedSharedMemoryPerBlock: return kReservedShared;
      case cudaDevAttrMaxRegistersPerBlock:
      case cudaDevAttrMaxRegistersPerMultiprocessor: return kRegisters;
      case cudaDevAttrMaxThreadsPerMultiProcessor: return device.threads_per_sm;
      case cudaDevAttrMaxBlocksPerMultiprocessor: return device.blocks_per_sm;
      case cudaDevAttrMultiProcessorCount: return device.sm_count;
      case cudaDevAttrWarpSize: return kLanes;
      case cudaDevAttrL2CacheSize: return 50 << 20;
      case cudaDevAttrCooperativeLaunch: return device.cooperative;
      case cudaDevAttrClusterLaunch: return device.clusters;
      case cudaDevAttrComputeCapabilityMajor: return device.capability / 10;
      case cudaDevAttrComputeCapabilityMinor: return device.capability % 10;
    }
    return 0;
  }();
  *value = int(found);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** address, size_t bytes) {
  *address = allocate("cudaMalloc", bytes, 0);
  return *address ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* address) {
  if (!address || release(static_cast<unsigned char*>(address))) return cudaSuccess;
  return failed(cudaErrorInvalidValue);
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  if (bytes == 0) return cudaSuccess;
  Region* const region = range(address, bytes);
  if (!region || !region->writable) return failed(cudaErrorInvalidValue);
  std::memset(address, value, bytes);
  set_written(*region, address, bytes, nullptr, nullptr);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  if (bytes == 0) return cudaSuccess;
  const bool to_device = kind == cudaMemcpyDeviceToDevice || kind == cudaMemcpyHostToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToDevice || kind == cudaMemcpyDeviceToHost;
  Region* const target = range(to, bytes);
  const Region* const source = range(from, bytes);
  if ((to_device && (!target || !target->writable)) || (from_device && !source)) return failed(cudaErrorInvalidValue);
  std::memcpy(to, from, bytes);
  if (target) set_written(*target, to, bytes, source, from);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

#define EXPORT extern "C" __attribute__((visibility("default")))

// A new device, no memory, no launches.
EXPORT void cuda_on_cpu_reset() {
  device = {};
  kernel_attributes.clear();
  last_error = cudaSuccess;
  launches.clear();
  forget_reports();
  release_all();
  grid_last = grid_start = now = 1;
}

EXPORT int cuda_on_cpu_set(const char* name, int64_t value) {
  for (const Setting& setting : kSettings) {
    if (std::strcmp(setting.name, name) == 0) return device.*setting.value = value, 1;
  }
  return 0;
}

EXPORT void* cuda_on_cpu_allocate(const char* name, size_t bytes, size_t misaligned_by) {
  return allocate(name, bytes, misaligned_by);
}

// The contents from the host, of which kernels may then only read where `writable` is 0.
EXPORT void cuda_on_cpu_fill(void* address, const void* from, size_t bytes, int writable) {
  if (Region* const region = bytes ? range(address, bytes) : nullptr) {
    std::memcpy(address, from, bytes);
    std::memset(region->written, 1, bytes);
    region->writable = writable != 0;
  }
}

// How many bytes nobody has written, and which is the first.
EXPORT size_t cuda_on_cpu_unwritten(const void* address, size_t bytes, size_t* first) {
  const Region* const region = bytes ? range(address, bytes) : nullptr;
  if (!region) return 0;
  const bool* const written = region->written;
  *first = size_t(std::find(written, written + bytes, false) - written);
  return size_t(std::count(written, written + bytes, false));
}

EXPORT const char* cuda_on_cpu_reports() { return reports().c_str(); }
EXPORT const char* cuda_on_cpu_launches() { return launches.c_str(); }
EXPORT void cuda_on_cpu_forget_launches() { launches.clear(); }
EXPORT void cuda_on_cpu_forget_reports() { forget_reports(); }
