// With bindings_cuda.cpp the only file that knows Python. Tensors come as addresses and sizes; wsss_kernels/ops checks
// them.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "affinity_loss.h"
#include "boundary_affinity.h"
#include "class_context.h"
#include "common/isa.h"
#include "common/neighbourhood.h"
#include "cross_image_attention.h"
#include "dense_crf.h"
#include "feature_walk.h"
#include "hspp.h"
#include "kmeans.h"
#include "local_affinity.h"
#include "mask_vote.h"
#include "pixel_adaptive.h"
#include "random_walk.h"
#include "random_walk_series.h"
#include "region_boxes.h"
#include "soft_histogram.h"

using namespace wsss::python;
using wsss::FeatureShape;
using wsss::WalkOptions;
using wsss::WalkShape;

namespace {

// -> the loss and the pairs of each class.
std::pair<double, std::array<double, 3>> affinity_loss(Address affinity, Address labels, int label_bytes,
                                                       int64_t ignore, int64_t batch, int64_t height, int64_t width,
                                                       int radius, bool cropped, int threads) {
  double loss;
  std::array<double, wsss::kPairClasses> counts;
  wsss::affinity_loss_cpu(at(affinity), {at<void>(labels), label_bytes, ignore}, &loss, counts.data(),
                          {batch, height, width}, radius, cropped, threads);
  return {loss, counts};
}

void affinity_loss_backward(double grad, Address affinity, Address labels, int label_bytes, int64_t ignore,
                            const std::array<double, 3>& counts, Address grad_affinity, int64_t batch, int64_t height,
                            int64_t width, int radius, bool cropped, int threads) {
  wsss::affinity_loss_backward_cpu(grad, at(affinity), {at<void>(labels), label_bytes, ignore}, counts.data(),
                                   at(grad_affinity), {batch, height, width}, radius, cropped, threads);
}

void boundary_affinity(Address boundary, Address out, int64_t batch, int64_t height, int64_t width, int radius,
                       int threads) {
  wsss::boundary_affinity_cpu(at(boundary), at(out), {batch, height, width}, radius, threads);
}

void boundary_affinity_backward(Address grad, Address boundary, Address grad_boundary, int64_t batch, int64_t height,
                                int64_t width, int radius, int threads) {
  wsss::boundary_affinity_backward_cpu(at(grad), at(boundary), at(grad_boundary), {batch, height, width}, radius,
                                       threads);
}

// Problems: x, rows, dim, clusters, start or 0, draws, runs, labels, centers, inertia, iterations.
int64_t kmeans(const std::vector<std::array<Address, 11>>& given, int64_t iterations, double tol, int threads) {
  std::vector<wsss::KMeansProblem> problems;
  for (const auto& p : given) {
    problems.push_back({at(p[0]), int64_t(p[1]), int64_t(p[2]), int64_t(p[3]), at(p[4]), at<double>(p[5]),
                        int64_t(p[6]), at<int64_t>(p[7]), at(p[8]), at<double>(p[9]), at<int64_t>(p[10])});
  }
  return wsss::kmeans_cpu(problems, iterations, tol, threads);
}

// Walks: feats, maps, out, batch, dim, channels, height, width, steps.
void feature_walks(const std::vector<std::array<Address, 9>>& given, int radius, bool cosine, double scale,
                   bool cropped, double beta, int solver, double tol, int threads) {
  std::vector<wsss::FeatureWalk> walks;
  for (const auto& w : given) {
    walks.push_back({at(w[0]), at(w[1]), at(w[2]),
                     FeatureShape{int64_t(w[3]), int64_t(w[4]), int64_t(w[6]), int64_t(w[7])}, int64_t(w[5]),
                     int64_t(w[8])});
  }
  wsss::feature_walks_cpu(walks, affinity_options(radius, cosine, scale, cropped),
                          walk_options(radius, beta, 0, solver, tol), threads);
}

void local_affinity(Address feats, Address out, Address scales, int64_t batch, int64_t dim, int64_t height,
                    int64_t width, int radius, bool cosine, double scale, bool cropped, int threads) {
  wsss::local_affinity_cpu(at(feats), at(out), at(scales), FeatureShape{batch, dim, height, width},
                           affinity_options(radius, cosine, scale, cropped), threads);
}

void local_affinity_backward(Address grad, Address feats, Address affinity, Address scales, Address grad_feats,
                             int64_t batch, int64_t dim, int64_t height, int64_t width, int radius, bool cosine,
                             double scale, bool cropped, int threads) {
  wsss::local_affinity_backward_cpu(at(grad), at(feats), at(affinity), at(scales), at(grad_feats),
                                    FeatureShape{batch, dim, height, width},
                                    affinity_options(radius, cosine, scale, cropped), threads);
}

void random_walk(Address maps, Address affinity, Address out, int64_t batch, int64_t channels, int64_t height,
                 int64_t width, int radius, double beta, int64_t steps, int solver, double tol, int threads) {
  wsss::random_walk_cpu(at(maps), at(affinity), at(out), WalkShape{batch, channels, height, width},
                        walk_options(radius, beta, steps, solver, tol), threads);
}

void random_walk_backward(Address grad, Address maps, Address affinity, Address grad_maps, Address grad_affinity,
                          int64_t batch, int64_t channels, int64_t height, int64_t width, int radius, double beta,
                          int64_t steps, int solver, double tol, int threads) {
  wsss::random_walk_backward_cpu(at(grad), at(maps), at(affinity), at(grad_maps), at(grad_affinity),
                                 WalkShape{batch, channels, height, width},
                                 walk_options(radius, beta, steps, solver, tol), threads);
}

void region_boxes(Address maps, Address out, int64_t batch, int64_t channels, int64_t height, int64_t width,
                  double threshold, int threads) {
  wsss::region_boxes_cpu(at(maps), at<uint8_t>(out), batch * channels, height, width, float(threshold), threads);
}

// Segments of one image: 4 or 8 bytes an id.
void segment_vote(Address maps, Address segments, Address out, int64_t channels, int64_t pixels, int id_bytes,
                  bool maximum, int threads) {
  const wsss::VoteShape shape{channels, pixels};
  if (id_bytes == 4) {
    wsss::segment_vote_cpu(at(maps), at<int32_t>(segments), at(out), shape, maximum, threads);
  } else {
    wsss::segment_vote_cpu(at(maps), at<int64_t>(segments), at(out), shape, maximum, threads);
  }
}

void mask_vote(Address maps, Address masks, Address out, int64_t channels, int64_t pixels, int64_t masks_count,
               bool maximum, int threads) {
  wsss::mask_vote_cpu(at(maps), at<uint8_t>(masks), at(out), wsss::VoteShape{channels, pixels}, masks_count, maximum,
                      threads);
}

// How a walk is evaluated, for kernels elsewhere: in float64 or not, and the series' coefficients (none: by power).
std::pair<bool, std::vector<double>> walk_method(int64_t steps, int solver, double tol) {
  const wsss::WalkMethod method = wsss::choose_walk_method(walk_options(5, 1, steps, solver, tol));
  return {method.in_double, method.series};
}

std::pair<bool, std::vector<double>> walk_gradient_method(int64_t steps, int solver, double tol) {
  const WalkOptions options = walk_options(5, 1, steps, solver, tol);
  return {wsss::gradient_in_double(options), wsss::gradient_series(options)};
}

void dense_crf(Address image, Address unary, Address out, int64_t batch, int64_t labels, int64_t height, int64_t width,
               int64_t iterations, const std::array<float, 3>& gaussian, const std::array<float, 6>& bilateral,
               int threads) {
  wsss::dense_crf_cpu(at(image), at(unary), at(out), wsss::CrfShape{batch, labels, height, width},
                      crf_options(iterations, gaussian, bilateral), threads);
}

void dense_energy(Address image, Address probs, Address roi, Address loss, Address slope, int64_t batch, int64_t labels,
                  int64_t height, int64_t width, const std::array<float, 5>& sigma, int threads) {
  wsss::dense_energy_cpu(at(image), at(probs), at(roi), at(loss), at(slope),
                         wsss::CrfShape{batch, labels, height, width}, sigma.data(), threads);
}

void pixel_adaptive(Address image, Address maps, Address out, int64_t batch, int64_t channels, int64_t height,
                    int64_t width, bool par, const std::vector<int>& dilations, int64_t iterations, int threads) {
  wsss::pixel_adaptive_cpu(at(image), at(maps), at(out), wsss::AdaptiveShape{batch, channels, height, width},
                           wsss::AdaptiveOptions{par, dilations.data(), int(dilations.size()), iterations}, threads);
}

void pixel_adaptive_backward(Address grad, Address image, Address grad_maps, int64_t batch, int64_t channels,
                             int64_t height, int64_t width, bool par, const std::vector<int>& dilations,
                             int64_t iterations, int threads) {
  wsss::pixel_adaptive_backward_cpu(
      at(grad), at(image), at(grad_maps), wsss::AdaptiveShape{batch, channels, height, width},
      wsss::AdaptiveOptions{par, dilations.data(), int(dilations.size()), iterations}, threads);
}

// sizes: batch, heads, queries, entries, dim, shared, and query, gradient and result channels first. memory: keys,
// values, key_bias, out_bias, mask.
wsss::AttentionShape attention_shape(const std::array<int64_t, 9>& sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5] != 0, sizes[6] != 0, sizes[7] != 0, sizes[8] != 0};
}
wsss::AttentionMemory attention_memory(const std::array<Address, 5>& memory) {
  return {at(memory[0]), at(memory[1]), at(memory[2]), at(memory[3]), at<uint8_t>(memory[4])};
}

void cross_image_attention(Address query, const std::array<Address, 5>& memory, Address out, Address entropy,
                           Address stats, Address weights, const std::array<int64_t, 9>& sizes, double scale,
                           int64_t top_k, double threshold, int threads) {
  wsss::cross_image_attention_cpu(at(query), attention_memory(memory), at(out), at(entropy), at(stats), at(weights),
                                  attention_shape(sizes), {float(scale), top_k, threshold}, threads);
}

// gradients: of query, keys, values, key_bias.
void cross_image_attention_backward(Address grad, Address grad_entropy, Address query,
                                    const std::array<Address, 5>& memory, Address stats, Address weights,
                                    const std::array<Address, 4>& gradients, const std::array<int64_t, 9>& sizes,
                                    double scale, int threads) {
  wsss::cross_image_attention_backward_cpu(at(grad), at(grad_entropy), at(query), attention_memory(memory), at(stats),
                                           at(weights),
                                           {at(gradients[0]), at(gradients[1]), at(gradients[2]), at(gradients[3])},
                                           attention_shape(sizes), float(scale), threads);
}

void class_context(Address feats, Address weights, Address classes, Address prototypes, Address sums, int64_t batch,
                   int64_t classes_count, int64_t dim, int64_t pixels, int threads) {
  wsss::class_context_cpu(at(feats), at(weights), at<int32_t>(classes), at(prototypes), at(sums),
                          wsss::ContextShape{batch, classes_count, dim, pixels}, threads);
}

void class_context_backward(Address grad, Address weights, Address classes, Address sums, Address grad_feats,
                            int64_t batch, int64_t classes_count, int64_t dim, int64_t pixels, int threads) {
  wsss::class_context_backward_cpu(at(grad), at(weights), at<int32_t>(classes), at(sums), at(grad_feats),
                                   wsss::ContextShape{batch, classes_count, dim, pixels}, threads);
}

// places: 0 where they are not wanted.
void hspp(Address feats, Address out, Address places, int64_t planes, int64_t height, int64_t width,
          const std::vector<int64_t>& levels, double gamma, int threads) {
  wsss::hspp_cpu(at(feats), at(out), at<int32_t>(places), wsss::PyramidShape{planes, height, width},
                 wsss::PyramidLevels{levels.data(), int(levels.size()), gamma}, threads);
}

void hspp_backward(Address grad, Address places, Address grad_feats, int64_t planes, int64_t height, int64_t width,
                   const std::vector<int64_t>& levels, double gamma, int threads) {
  wsss::hspp_backward_cpu(at(grad), at<int32_t>(places), at(grad_feats), wsss::PyramidShape{planes, height, width},
                          wsss::PyramidLevels{levels.data(), int(levels.size()), gamma}, threads);
}

void soft_histogram(Address feats, Address codebook, Address histogram, Address words, Address assignment,
                    Address inverse_norm, Address log_sum, int64_t batch, int64_t dim, int64_t pixels,
                    int64_t words_count, double temperature, int threads) {
  wsss::soft_histogram_cpu(at(feats), at(codebook), at(histogram), at<uint8_t>(words), at<int64_t>(assignment),
                           at(inverse_norm), at(log_sum), wsss::HistogramShape{batch, dim, pixels, words_count},
                           float(temperature), threads);
}

// grad_feats and grad_codebook: 0 where it is not wanted.
void soft_histogram_backward(Address grad, Address feats, Address codebook, Address inverse_norm, Address log_sum,
                             Address grad_feats, Address grad_codebook, int64_t batch, int64_t dim, int64_t pixels,
                             int64_t words_count, double temperature, int threads) {
  wsss::soft_histogram_backward_cpu(at(grad), at(feats), at(codebook), at(inverse_norm), at(log_sum), at(grad_feats),
                                    at(grad_codebook), wsss::HistogramShape{batch, dim, pixels, words_count},
                                    float(temperature), threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  m.attr("max_radius") = wsss::kMaxRadius;
  m.attr("cpu_isa") = wsss::isa_name(wsss::cpu_isa());
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
#ifdef WSSS_CUDA_ARCHS
  m.attr("cuda_archs") = WSSS_CUDA_ARCHS;
#else
  m.attr("cuda_archs") = "";
#endif
#ifdef WSSS_WITH_CUDA
  bind_cuda(m);
#endif
  m.def("affinity_loss", &affinity_loss, without_gil);
  m.def("affinity_loss_backward", &affinity_loss_backward, without_gil);
  m.def("boundary_affinity", &boundary_affinity, without_gil);
  m.def("boundary_affinity_backward", &boundary_affinity_backward, without_gil);
  m.def("kmeans", &kmeans, without_gil);
  m.def("class_context", &class_context, without_gil);
  m.def("class_context_backward", &class_context_backward, without_gil);
  m.def("cross_image_attention", &cross_image_attention, without_gil);
  m.def("cross_image_attention_backward", &cross_image_attention_backward, without_gil);
  m.def("local_affinity", &local_affinity, without_gil);
  m.def("local_affinity_backward", &local_affinity_backward, without_gil);
  m.def("pixel_adaptive", &pixel_adaptive, without_gil);
  m.def("pixel_adaptive_backward", &pixel_adaptive_backward, without_gil);
  m.attr("max_dilations") = wsss::kMaxDilations;
  m.def("random_walk", &random_walk, without_gil);
  m.def("random_walk_backward", &random_walk_backward, without_gil);
  m.def("region_boxes", &region_boxes, without_gil);
  m.def("feature_walks", &feature_walks, without_gil);
  m.def("hspp", &hspp, without_gil);
  m.def("hspp_backward", &hspp_backward, without_gil);
  m.def("soft_histogram", &soft_histogram, without_gil);
  m.def("soft_histogram_backward", &soft_histogram_backward, without_gil);
  m.def("segment_vote", &segment_vote, without_gil);
  m.def("mask_vote", &mask_vote, without_gil);
  m.def("dense_crf", &dense_crf, without_gil);
  m.def("dense_energy_loss", &dense_energy, without_gil);
  m.def("walk_method", &walk_method);
  m.def("walk_gradient_method", &walk_gradient_method);
}
