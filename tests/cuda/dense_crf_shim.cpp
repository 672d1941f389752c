#include "cuda_on_cpu/shim.h"
#include "dense_crf.h"

using namespace wsss;

namespace {

CrfOptions options_of(int64_t iterations, double g_sigma, double g_compat, double b_xy, double b_rgb, double b_compat) {
  const float g = float(g_sigma), xy = float(b_xy), rgb = float(b_rgb);
  return {iterations, {g, g}, float(g_compat), {xy, xy, rgb, rgb, rgb}, float(b_compat)};
}

}  // namespace

#define SHAPE int64_t batch, int64_t labels, int64_t height, int64_t width
#define OPTIONS int64_t iterations, double g_sigma, double g_compat, double b_xy, double b_rgb, double b_compat
#define SHAPE_OF \
  CrfShape { batch, labels, height, width }
#define OPTIONS_OF options_of(iterations, g_sigma, g_compat, b_xy, b_rgb, b_compat)

EXPORTED crf_workspace(SHAPE, OPTIONS, int64_t* bytes) {
  return cuda_on_cpu::message_of([&] { *bytes = int64_t(dense_crf_cuda_workspace(SHAPE_OF, OPTIONS_OF)); });
}

EXPORTED crf(const float* image, const float* unary, float* out, SHAPE, OPTIONS, void* workspace, int64_t bytes) {
  return cuda_on_cpu::message_of(
      [&] { dense_crf_cuda(image, unary, out, SHAPE_OF, OPTIONS_OF, workspace, size_t(bytes), nullptr); });
}

EXPORTED energy_workspace(SHAPE, double xy, double rgb, int64_t* bytes) {
  return cuda_on_cpu::message_of([&] {
    const float sigma[] = {float(xy), float(xy), float(rgb), float(rgb), float(rgb)};
    *bytes = int64_t(dense_energy_cuda_workspace(SHAPE_OF, sigma));
  });
}

EXPORTED energy(const float* image, const float* probs, const float* roi, float* loss, float* slope, SHAPE, double xy,
                double rgb, void* workspace, int64_t bytes) {
  return cuda_on_cpu::message_of([&] {
    const float sigma[] = {float(xy), float(xy), float(rgb), float(rgb), float(rgb)};
    dense_energy_cuda(image, probs, roi, loss, slope, SHAPE_OF, sigma, workspace, size_t(bytes), nullptr);
  });
}
