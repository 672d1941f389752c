// How the arguments of Python become those of the kernels.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "dense_crf.h"
#include "local_affinity.h"
#include "random_walk.h"

namespace wsss::python {

namespace py = pybind11;

using Address = uintptr_t;

template <class T = float>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// scale 0 = automatic. Below 1e-37 float32 cannot hold 1 / scale; the affinities are the same.
inline AffinityOptions affinity_options(int radius, bool cosine, double scale, bool cropped) {
  return {radius, cosine ? AffinityMetric::kCosine : AffinityMetric::kL1, scale == 0,
          scale == 0 ? 1.0 : std::max(scale, 1e-37), cropped};
}

inline WalkOptions walk_options(int radius, double beta, int64_t steps, int solver, double tol) {
  return {radius, beta, steps, static_cast<WalkSolver>(solver), tol};
}

// gaussian: sigma x, y, compat. bilateral: sigma x, y, r, g, b, compat.
inline CrfOptions crf_options(int64_t iterations, const std::array<float, 3>& gaussian,
                              const std::array<float, 6>& bilateral) {
  CrfOptions options{iterations, {gaussian[0], gaussian[1]}, gaussian[2], {}, bilateral[5]};
  std::copy_n(bilateral.begin(), 5, options.bilateral_sigma);
  return options;
}

void bind_cuda(py::module_& m);

}  // namespace wsss::python
