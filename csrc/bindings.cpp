// The only file that knows Python. Tensors come as addresses and sizes; wsss_kernels/ops checks them.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <utility>

#include "common/isa.h"
#include "common/neighbourhood.h"
#ifdef WSSS_WITH_CUDA
#include "cuda_device.h"
#endif
#include "local_affinity.h"
#include "random_walk.h"

namespace py = pybind11;
using wsss::AffinityMetric;
using wsss::AffinityOptions;
using wsss::FeatureShape;
using wsss::WalkOptions;
using wsss::WalkShape;
using wsss::WalkSolver;

namespace {

using Address = uintptr_t;

template <class T = float>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// scale 0 = automatic. Below 1e-37 float32 cannot hold 1 / scale; the affinities are the same.
AffinityOptions affinity_options(int radius, bool cosine, double scale, bool cropped) {
  return {radius, cosine ? AffinityMetric::kCosine : AffinityMetric::kL1, scale == 0,
          scale == 0 ? 1.0 : std::max(scale, 1e-37), cropped};
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

WalkOptions walk_options(int radius, double beta, int64_t steps, int solver, double tol) {
  return {radius, beta, steps, static_cast<WalkSolver>(solver), tol};
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

#ifdef WSSS_WITH_CUDA
std::pair<int, std::string> cuda_device_count() {
  std::string message;
  const int count = wsss::cuda_device_count(&message);
  return {count, message};
}

int cuda_probe(Address stream) { return wsss::cuda_probe(at<void>(stream)); }
#endif

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
  m.def("cuda_runtime_version", &wsss::cuda_runtime_version);
  m.def("cuda_device_count", &cuda_device_count, without_gil);
  m.def("cuda_probe", &cuda_probe, py::arg("stream") = Address{0}, without_gil);
#endif
  m.def("local_affinity", &local_affinity, without_gil);
  m.def("local_affinity_backward", &local_affinity_backward, without_gil);
  m.def("random_walk", &random_walk, without_gil);
  m.def("random_walk_backward", &random_walk_backward, without_gil);
}
