// With bindings_cuda.cpp the only file that knows Python. Tensors come as addresses and sizes; wsss_kernels/ops checks
// them.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "boundary_affinity.h"
#include "common/isa.h"
#include "common/neighbourhood.h"
#include "local_affinity.h"
#include "random_walk.h"
#include "random_walk_series.h"

using namespace wsss::python;
using wsss::FeatureShape;
using wsss::WalkOptions;
using wsss::WalkShape;

namespace {

void boundary_affinity(Address boundary, Address out, int64_t batch, int64_t height, int64_t width, int radius,
                       int threads) {
  wsss::boundary_affinity_cpu(at(boundary), at(out), {batch, height, width}, radius, threads);
}

void boundary_affinity_backward(Address grad, Address boundary, Address grad_boundary, int64_t batch, int64_t height,
                                int64_t width, int radius, int threads) {
  wsss::boundary_affinity_backward_cpu(at(grad), at(boundary), at(grad_boundary), {batch, height, width}, radius,
                                       threads);
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

// How a walk is evaluated, for kernels elsewhere: in float64 or not, and the series' coefficients (none: by power).
std::pair<bool, std::vector<double>> walk_method(int64_t steps, int solver, double tol) {
  const wsss::WalkMethod method = wsss::choose_walk_method(walk_options(5, 1, steps, solver, tol));
  return {method.in_double, method.series};
}

std::pair<bool, std::vector<double>> walk_gradient_method(int64_t steps, int solver, double tol) {
  const WalkOptions options = walk_options(5, 1, steps, solver, tol);
  return {wsss::gradient_in_double(options), wsss::gradient_series(options)};
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
  m.def("boundary_affinity", &boundary_affinity, without_gil);
  m.def("boundary_affinity_backward", &boundary_affinity_backward, without_gil);
  m.def("local_affinity", &local_affinity, without_gil);
  m.def("local_affinity_backward", &local_affinity_backward, without_gil);
  m.def("random_walk", &random_walk, without_gil);
  m.def("random_walk_backward", &random_walk_backward, without_gil);
  m.def("walk_method", &walk_method);
  m.def("walk_gradient_method", &walk_gradient_method);
}
