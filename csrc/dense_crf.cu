// Mean field on the GPU: an iteration is a launch that slices both lattices, takes the softmax and leaves the marginals
// as rows, and the launches of the filter, which do both lattices side by side.
#include "dense_crf.h"

#include <cmath>

#include "dense_crf_images.h"
#include "permutohedral_device.cuh"

namespace wsss {
namespace {

struct MeanField {
  CudaLattices terms;
  float compat[2];
  LatticeRows rows;
  LatticePlanes planes;
  const float* unary;  // the first pass has nothing but these to start from, the others find the energies
  float4* energies;    // rows: -unary
  float4* marginals;   // rows
  float* out;          // the last pass leaves planes here instead of the marginals; else null
};

__device__ __forceinline__ float4 own_energy(const MeanField& m, uint32_t pixel, int column) {
  const size_t at = size_t(pixel) * m.rows.columns + column;
  if (!m.unary) return m.energies[at];
  float4 energy = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
  for_each_label(column, m.planes.labels, energy,
                 [&](int label, float& value) { value = -m.unary[m.planes.at(pixel, label)]; });
  if (m.energies) m.energies[at] = energy;
  return energy;
}

__device__ __forceinline__ float4 energy_of(const MeanField& m, uint32_t pixel, int column) {
  float4 energy = own_energy(m, pixel, column);
  if (m.unary) return energy;
  for (int t = 0; t < m.terms.count; ++t) {
    const CudaLattice& lattice = m.terms.each[t];
    energy = energy + m.compat[t] * lattice.alpha * slice(lattice, pixel, m.rows.columns, column);
  }
  return energy;
}

__device__ __forceinline__ void store(const MeanField& m, uint32_t pixel, int column, float4 marginals) {
  if (m.out) {
    for_each_label(column, m.planes.labels, marginals,
                   [&](int label, float& value) { m.out[m.planes.at(pixel, label)] = value; });
  } else {
    m.marginals[size_t(pixel) * m.rows.columns + column] = marginals;
  }
}

// exp(energy - largest), 0 beyond the labels.
__device__ __forceinline__ float4 exponentials(const MeanField& m, int column, float4 energy, float largest) {
  const int labels = m.planes.labels - 4 * column;
  return make_float4(expf(energy.x - largest), labels > 1 ? expf(energy.y - largest) : 0,
                     labels > 2 ? expf(energy.z - largest) : 0, labels > 3 ? expf(energy.w - largest) : 0);
}

// Q = softmax(energies). NaN where a softmax is: of a NaN, a +infinity, -infinity alone. kMany: a thread has more than
// one column of its pixel, and keeps them where the marginals go.
template <bool kMany>
__global__ void __launch_bounds__(kLatticeThreads) mean_field_kernel(const MeanField m) {
  const uint32_t thread = blockIdx.x * kLatticeThreads + threadIdx.x;
  const uint32_t together = (gridDim.x * kLatticeThreads) >> m.rows.lane_bits;
  const int lanes = 1 << m.rows.lane_bits, lane = int(thread) & (lanes - 1), columns = m.rows.columns;
  // A warp stays together: its lanes exchange what they find.
  for (uint32_t first = (thread & ~31u) >> m.rows.lane_bits; first < m.planes.pixels; first += together) {
    const uint32_t pixel = first + ((thread & 31) >> m.rows.lane_bits);
    const int end = pixel < m.planes.pixels ? columns : 0;
    float4* const kept = m.marginals + size_t(pixel) * columns;
    float4 value = make_float4(0, 0, 0, 0);
    float largest = -INFINITY;
    for (int column = lane; column < end; column += lanes) {
      value = energy_of(m, pixel, column);
      if (kMany) kept[column] = value;
      largest = fmaxf(largest, fmaxf(fmaxf(value.x, value.y), fmaxf(value.z, value.w)));
    }
    for (int distance = 1; distance < lanes; distance *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    }
    float sum = 0;
    for (int column = lane; column < end; column += lanes) {
      value = exponentials(m, column, kMany ? kept[column] : value, largest);
      if (kMany) kept[column] = value;
      sum += (value.x + value.y) + (value.z + value.w);
    }
    for (int distance = 1; distance < lanes; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    for (int column = lane; column < end; column += lanes) {
      store(m, pixel, column, 1 / sum * (kMany ? kept[column] : value));
    }
  }
}

// What `images` of a batch need.
class Inference {
 public:
  Inference(const CrfShape& shape, const CrfOptions& options, int64_t images, void* block)
      : workspace_(block), iterations_(options.iterations), pass_() {
    const LatticeRows rows = lattice_rows(shape.labels);
    const uint32_t plane = uint32_t(shape.height * shape.width);
    pass_.rows = rows;
    pass_.planes = {uint32_t(images) * plane, plane, int(shape.labels)};
    const auto add = [&](const LatticeSpace& space, int64_t own, int64_t copies, float compat) {
      if (compat == 0 || options.iterations == 0) return;
      pass_.compat[pass_.terms.count] = compat;
      pass_.terms.each[pass_.terms.count++] = plan_lattice(space, own, copies, rows, workspace_);
    };
    const float* sigma = options.gaussian_sigma;
    add({2, shape.height, shape.width, {sigma[0], sigma[1]}}, 1, images, options.gaussian_compat);
    sigma = options.bilateral_sigma;
    add({5, shape.height, shape.width, {sigma[0], sigma[1], sigma[2], sigma[3], sigma[4]}}, images, 1,
        options.bilateral_compat);
    if (pass_.terms.count == 0) iterations_ = 0;
    const size_t columns = size_t(pass_.planes.pixels) * rows.columns;
    pass_.marginals = workspace_.take<float4>(columns);
    if (iterations_ > 0) pass_.energies = workspace_.take<float4>(columns);
  }

  size_t bytes() const { return workspace_.bytes(); }

  void run(const float* image, const float* unary, float* out, cudaStream_t stream) {
    for (int t = 0; t < pass_.terms.count; ++t) pass_.terms.each[t].image = image;
    if (iterations_ > 0) build_lattices(pass_.terms, true, stream);
    for (int64_t i = 0; i <= iterations_; ++i) {
      MeanField pass = pass_;
      pass.unary = i == 0 ? unary : nullptr;
      pass.out = i == iterations_ ? out : nullptr;
      const Launch how{dim3(lattice_blocks(double(pass.planes.pixels) * (1 << pass.rows.lane_bits))),
                       dim3(kLatticeThreads), 0, stream};
      const bool many = pass.rows.columns > 1 << pass.rows.lane_bits;
      launch("mean_field_kernel", how, many ? mean_field_kernel<true> : mean_field_kernel<false>, pass);
      if (i < iterations_) filter_lattices(pass.terms, pass.rows, pass.marginals, stream);
    }
  }

 private:
  Workspace workspace_;
  int64_t iterations_;
  MeanField pass_;
};

}  // namespace

size_t dense_crf_cuda_workspace(CrfShape shape, const CrfOptions& options) {
  if (empty(shape)) return 0;
  return workspace_for_images(shape,
                              [&](int64_t images) { return Inference(shape, options, images, nullptr).bytes(); });
}

void dense_crf_cuda(const float* image, const float* unary, float* out, CrfShape shape, const CrfOptions& options,
                    void* workspace, size_t workspace_bytes, void* stream) {
  if (empty(shape)) return;
  const size_t plane = size_t(shape.height) * shape.width;
  for_each_group(
      shape, workspace_bytes, [&](int64_t images) { return Inference(shape, options, images, nullptr).bytes(); },
      [&](int64_t first, int64_t images) {
        const size_t at = size_t(first) * shape.labels * plane;
        Inference(shape, options, images, workspace)
            .run(image + size_t(first) * 3 * plane, unary + at, out + at, static_cast<cudaStream_t>(stream));
      });
}

}  // namespace wsss
