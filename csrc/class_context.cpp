#include "class_context.h"

#include <algorithm>
#include <vector>

#include "class_context_kernels.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace wsss {

WSSS_FOR_EACH_ISA(extern const ContextKernels context_kernels;)

namespace {

const ContextKernels& kernels() { return WSSS_CHOOSE_ISA(context_kernels); }

constexpr double kValuesPerThread = 1e5;

// The pixels of each class of an image, in their order.
class Chosen {
 public:
  Chosen(const float* weights, const int32_t* classes, const ContextShape& shape)
      : starts_(size_t(shape.classes) + 1), sums_(size_t(shape.classes)) {
    for (int64_t p = 0; p < shape.pixels; ++p) {
      if (classes[p] >= 0) ++starts_[classes[p] + 1];
    }
    for (int64_t c = 0; c < shape.classes; ++c) starts_[c + 1] += starts_[c];
    pixels_.resize(starts_.back());
    weights_.resize(starts_.back());
    std::vector<int32_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t p = 0; p < shape.pixels; ++p) {
      if (classes[p] < 0) continue;
      const int32_t place = next[classes[p]]++;
      pixels_[place] = int32_t(p), weights_[place] = weights[p];
      sums_[classes[p]] += weights[p];
    }
  }
  ContextPixels view() const { return {pixels_.data(), weights_.data(), starts_.data(), int(starts_.size()) - 1}; }
  const std::vector<double>& sums() const { return sums_; }

 private:
  std::vector<int32_t> starts_, pixels_;
  std::vector<float> weights_;
  std::vector<double> sums_;
};

}  // namespace

void class_context_cpu(const float* feats, const float* weights, const int32_t* classes, float* prototypes, float* sums,
                       ContextShape shape, int threads) {
  const double work = double(shape.dim) * double(shape.pixels);
  threads = worthwhile_threads(usable_threads(threads), work, kValuesPerThread);
  std::vector<float> scales(shape.classes);
  for (int64_t b = 0; b < shape.batch; ++b) {
    const Chosen chosen(weights + b * shape.pixels, classes + b * shape.pixels, shape);
    for (int64_t c = 0; c < shape.classes; ++c) {
      sums[b * shape.classes + c] = float(chosen.sums()[c]);
      scales[c] = float(1 / (chosen.sums()[c] + 1e-5));
    }
    parallel(threads, [&](const Team& team) {
      const int64_t d = team.begin(shape.dim);
      kernels().gather(chosen.view(), feats + (b * shape.dim + d) * shape.pixels, shape.pixels, team.end(shape.dim) - d,
                       scales.data(), prototypes + b * shape.classes * shape.dim + d, shape.dim);
    });
  }
}

void class_context_backward_cpu(const float* grad, const float* weights, const int32_t* classes, const float* sums,
                                float* grad_feats, ContextShape shape, int threads) {
  const double work = double(shape.dim) * double(shape.pixels);
  threads = worthwhile_threads(usable_threads(threads), work, kValuesPerThread);
  std::vector<float> scales(shape.classes);
  for (int64_t b = 0; b < shape.batch; ++b) {
    const Chosen chosen(weights + b * shape.pixels, classes + b * shape.pixels, shape);
    for (int64_t c = 0; c < shape.classes; ++c) scales[c] = float(1 / (double(sums[b * shape.classes + c]) + 1e-5));
    parallel(threads, [&](const Team& team) {
      const int64_t d = team.begin(shape.dim), channels = team.end(shape.dim) - d;
      float* const rows = grad_feats + (b * shape.dim + d) * shape.pixels;
      std::fill_n(rows, channels * shape.pixels, 0.0f);
      kernels().scatter(chosen.view(), grad + b * shape.classes * shape.dim + d, scales.data(), shape.dim, shape.pixels,
                        channels, rows);
    });
  }
}

}  // namespace wsss
