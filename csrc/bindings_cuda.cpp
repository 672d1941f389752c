// The CUDA kernels' part of the module.
#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "bindings.h"
#include "cuda_device.h"

namespace wsss::python {
namespace {

size_t local_affinity_cuda_workspace(int64_t batch, int64_t dim, int64_t height, int64_t width, int radius, bool cosine,
                                     double scale, bool cropped, int type, int device) {
  const CudaDevice current(device);
  return wsss::local_affinity_cuda_workspace(FeatureShape{batch, dim, height, width},
                                             affinity_options(radius, cosine, scale, cropped), DataType(type));
}

void local_affinity_cuda(Address feats, Address out, Address scales, int64_t batch, int64_t dim, int64_t height,
                         int64_t width, int radius, bool cosine, double scale, bool cropped, int type,
                         Address workspace, int device, Address stream) {
  const CudaDevice current(device);
  wsss::local_affinity_cuda(at<void>(feats), at<void>(out), at(scales), FeatureShape{batch, dim, height, width},
                            affinity_options(radius, cosine, scale, cropped), DataType(type), at<void>(workspace),
                            at<void>(stream));
}

size_t local_affinity_backward_cuda_workspace(int64_t batch, int64_t dim, int64_t height, int64_t width, int radius,
                                              bool cosine, double scale, bool cropped, int type, int device) {
  const CudaDevice current(device);
  return wsss::local_affinity_backward_cuda_workspace(FeatureShape{batch, dim, height, width},
                                                      affinity_options(radius, cosine, scale, cropped), DataType(type));
}

void local_affinity_backward_cuda(Address grad, Address feats, Address affinity, Address scales, Address grad_feats,
                                  int64_t batch, int64_t dim, int64_t height, int64_t width, int radius, bool cosine,
                                  double scale, bool cropped, int type, Address workspace, int device, Address stream) {
  const CudaDevice current(device);
  wsss::local_affinity_backward_cuda(at<void>(grad), at<void>(feats), at<void>(affinity), at(scales),
                                     at<void>(grad_feats), FeatureShape{batch, dim, height, width},
                                     affinity_options(radius, cosine, scale, cropped), DataType(type),
                                     at<void>(workspace), at<void>(stream));
}

CudaWalkPlan plan_random_walk_cuda(int64_t batch, int64_t channels, int64_t height, int64_t width, int radius,
                                   int64_t steps, int solver, double tol, int device) {
  const CudaDevice current(device);
  return wsss::plan_random_walk_cuda(WalkShape{batch, channels, height, width},
                                     walk_options(radius, 1, steps, solver, tol));
}

void random_walk_cuda(Address maps, Address affinity, Address out, int64_t batch, int64_t channels, int64_t height,
                      int64_t width, int radius, double beta, int64_t steps, int solver, double tol,
                      const CudaWalkPlan& plan, Address workspace, int device, Address stream) {
  const CudaDevice current(device);
  wsss::random_walk_cuda(at(maps), at(affinity), at(out), WalkShape{batch, channels, height, width},
                         walk_options(radius, beta, steps, solver, tol), plan, at<void>(workspace), at<void>(stream));
}

size_t random_walk_backward_cuda_workspace(int64_t batch, int64_t channels, int64_t height, int64_t width, int radius,
                                           int64_t steps, int solver, double tol, bool wants_affinity) {
  return wsss::random_walk_backward_cuda_workspace(WalkShape{batch, channels, height, width},
                                                   walk_options(radius, 1, steps, solver, tol), wants_affinity);
}

void random_walk_backward_cuda(Address grad, Address maps, Address affinity, Address grad_maps, Address grad_affinity,
                               int64_t batch, int64_t channels, int64_t height, int64_t width, int radius, double beta,
                               int64_t steps, int solver, double tol, Address workspace, int device, Address stream) {
  const CudaDevice current(device);
  wsss::random_walk_backward_cuda(
      at(grad), at(maps), at(affinity), at(grad_maps), at(grad_affinity), WalkShape{batch, channels, height, width},
      walk_options(radius, beta, steps, solver, tol), at<void>(workspace), at<void>(stream));
}

size_t dense_crf_cuda_workspace(int64_t batch, int64_t labels, int64_t height, int64_t width, int64_t iterations,
                                const std::array<float, 3>& gaussian, const std::array<float, 6>& bilateral) {
  return wsss::dense_crf_cuda_workspace(CrfShape{batch, labels, height, width},
                                        crf_options(iterations, gaussian, bilateral));
}

void dense_crf_cuda(Address image, Address unary, Address out, int64_t batch, int64_t labels, int64_t height,
                    int64_t width, int64_t iterations, const std::array<float, 3>& gaussian,
                    const std::array<float, 6>& bilateral, Address workspace, size_t workspace_bytes, int device,
                    Address stream) {
  const CudaDevice current(device);
  wsss::dense_crf_cuda(at(image), at(unary), at(out), CrfShape{batch, labels, height, width},
                       crf_options(iterations, gaussian, bilateral), at<void>(workspace), workspace_bytes,
                       at<void>(stream));
}

size_t dense_energy_loss_cuda_workspace(int64_t batch, int64_t labels, int64_t height, int64_t width,
                                        const std::array<float, 5>& sigma) {
  return wsss::dense_energy_cuda_workspace(CrfShape{batch, labels, height, width}, sigma.data());
}

void dense_energy_loss_cuda(Address image, Address probs, Address roi, Address loss, Address slope, int64_t batch,
                            int64_t labels, int64_t height, int64_t width, const std::array<float, 5>& sigma,
                            Address workspace, size_t workspace_bytes, int device, Address stream) {
  const CudaDevice current(device);
  wsss::dense_energy_cuda(at(image), at(probs), at(roi), at(loss), at(slope), CrfShape{batch, labels, height, width},
                          sigma.data(), at<void>(workspace), workspace_bytes, at<void>(stream));
}

std::pair<int, std::string> cuda_device_count() {
  std::string message;
  const int count = wsss::cuda_device_count(&message);
  return {count, message};
}

int cuda_probe(Address stream) { return wsss::cuda_probe(at<void>(stream)); }

}  // namespace

void bind_cuda(py::module_& m) {
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  m.def("cuda_runtime_version", &cuda_runtime_version);
  m.def("cuda_device_count", &cuda_device_count, without_gil);
  m.def("cuda_probe", &cuda_probe, py::arg("stream") = Address{0}, without_gil);
  m.def("cuda_runs_on", &cuda_runs_on, without_gil);
  m.def("local_affinity_cuda_workspace", &local_affinity_cuda_workspace);
  m.def("local_affinity_cuda", &local_affinity_cuda, without_gil);
  m.def("local_affinity_backward_cuda_workspace", &local_affinity_backward_cuda_workspace);
  m.def("local_affinity_backward_cuda", &local_affinity_backward_cuda, without_gil);
  m.def("dense_crf_cuda_workspace", &dense_crf_cuda_workspace);
  m.def("dense_crf_cuda", &dense_crf_cuda, without_gil);
  m.def("dense_energy_loss_cuda_workspace", &dense_energy_loss_cuda_workspace);
  m.def("dense_energy_loss_cuda", &dense_energy_loss_cuda, without_gil);
  py::class_<CudaWalkPlan>(m, "CudaWalkPlan")
      .def_readonly("workspace", &CudaWalkPlan::workspace)
      .def_readonly("blocks", &CudaWalkPlan::blocks)
      .def_property_readonly("form", [](const CudaWalkPlan& plan) {
        static const char* const names[] = {"cluster", "grid", "phases"};
        return names[int(plan.form)];
      });
  m.def("plan_random_walk_cuda", &plan_random_walk_cuda, without_gil);
  m.def("random_walk_cuda", &random_walk_cuda, without_gil);
  m.def("random_walk_backward_cuda_workspace", &random_walk_backward_cuda_workspace);
  m.def("random_walk_backward_cuda", &random_walk_backward_cuda, without_gil);
}

}  // namespace wsss::python
