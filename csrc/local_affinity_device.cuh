// What the CUDA kernels of local_affinity share.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_launch.h"
#include "common/neighbourhood.h"
#include "local_affinity.h"

namespace wsss {

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ inline void store(float* to, float v) { *to = v; }
__device__ inline void store(__half* to, float v) { *to = __float2half_rn(v); }
__device__ inline void store(__nv_bfloat16* to, float v) { *to = __float2bfloat16_rn(v); }

// body(T()) for the type of the data.
template <class Body>
void with_data_type(DataType type, Body body) {
  switch (type) {
    case DataType::kFloat32: return body(float());
    case DataType::kFloat16: return body(__half());
    case DataType::kBFloat16: return body(__nv_bfloat16());
  }
}

constexpr float kLeastScale = 1e-37f;  // below it 1 / scale is no float; the affinities are the same

constexpr int64_t kMostBlocks = 1 << 20;  // of a grid whose blocks can take more than their share

// Blocks of `size` in `count`.
inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// 1 / |f| of every pixel [B, H, W], 0 for a zero vector.
void launch_inverse_norms(const void* feats, float* norms, FeatureShape shape, DataType type, cudaStream_t stream);

}  // namespace wsss
