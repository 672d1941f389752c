#include "cuda_on_cpu/shim.h"
#include "local_affinity.h"

using namespace wsss;

namespace {

AffinityOptions options_of(int64_t radius, int64_t cosine, double scale, int64_t cropped) {
  const bool automatic = scale == 0;
  return {int(radius), cosine ? AffinityMetric::kCosine : AffinityMetric::kL1, automatic, automatic ? 1 : scale,
          cropped != 0};
}

}  // namespace

#define PROBLEM                                                                                            \
  int64_t batch, int64_t dim, int64_t height, int64_t width, int64_t radius, int64_t cosine, double scale, \
      int64_t cropped, int64_t type
#define SHAPE_OPTIONS_TYPE \
  FeatureShape{batch, dim, height, width}, options_of(radius, cosine, scale, cropped), DataType(type)

EXPORTED forward_workspace(PROBLEM, int64_t* bytes) {
  return cuda_on_cpu::message_of([&] { *bytes = int64_t(local_affinity_cuda_workspace(SHAPE_OPTIONS_TYPE)); });
}

EXPORTED forward(const void* feats, void* out, float* scales, PROBLEM, void* workspace) {
  return cuda_on_cpu::message_of(
      [&] { local_affinity_cuda(feats, out, scales, SHAPE_OPTIONS_TYPE, workspace, nullptr); });
}

EXPORTED backward_workspace(PROBLEM, int64_t* bytes) {
  return cuda_on_cpu::message_of([&] { *bytes = int64_t(local_affinity_backward_cuda_workspace(SHAPE_OPTIONS_TYPE)); });
}

EXPORTED backward(const void* grad, const void* feats, const void* affinity, const float* scales, void* grad_feats,
                  PROBLEM, void* workspace) {
  return cuda_on_cpu::message_of([&] {
    local_affinity_backward_cuda(grad, feats, affinity, scales, grad_feats, SHAPE_OPTIONS_TYPE, workspace, nullptr);
  });
}
