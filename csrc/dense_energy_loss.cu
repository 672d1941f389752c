// Dense energy on the GPU: probabilities times roi as rows, filtered; one launch slices them, writes the slope and sums
// up the loss by blocks, one adds up the blocks in their order.
#include "dense_crf.h"
#include "dense_crf_images.h"
#include "permutohedral_device.cuh"

namespace wsss {
namespace {

struct Energy {
  CudaLattices lattice;
  LatticeRows rows;
  LatticePlanes planes;
  const float *probs, *roi;  // planes;  [images, H, W] or null
  float4* sources;           // rows: probs x roi
  float* slope;              // planes, or null
  double* sums;              // [images][blocks] of <S, F(S)>
  uint32_t blocks;           // of an image
  float per_slope;           // -2 / B
};

__device__ __forceinline__ float roi_of(const Energy& e, uint32_t pixel) { return e.roi ? e.roi[pixel] : 1.0f; }

__global__ void __launch_bounds__(kLatticeThreads) sources_kernel(const Energy e) {
  for_each_row(e.rows, e.planes.pixels, [&](uint32_t pixel, int lane, int lanes) {
    const float roi = roi_of(e, pixel);
    for (int column = lane; column < e.rows.columns; column += lanes) {
      float4 source = make_float4(0, 0, 0, 0);
      for_each_label(column, e.planes.labels, source,
                     [&](int label, float& value) { value = roi * e.probs[e.planes.at(pixel, label)]; });
      e.sources[size_t(pixel) * e.rows.columns + column] = source;
    }
  });
}

// The sum over the block's threads, of which the first gets it.
__device__ double block_sum(double value, double* warp_sums) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kLatticeThreads / 32; ++w) total += warp_sums[w];
  }
  return total;
}

// As many pixels a block as it has rows, all of one image, whatever the device: the order of summation is part of the
// result.
__global__ void __launch_bounds__(kLatticeThreads) slope_kernel(const Energy e) {
  const int lanes = 1 << e.rows.lane_bits, lane = int(threadIdx.x) & (lanes - 1);
  const uint32_t image = blockIdx.x / e.blocks, block = blockIdx.x - image * e.blocks;
  const uint32_t place = (block * kLatticeThreads + threadIdx.x) >> e.rows.lane_bits;
  const bool inside = place < e.planes.plane;
  const uint32_t pixel = image * e.planes.plane + place;
  const float factor = inside ? e.per_slope * roi_of(e, pixel) : 0;
  double sum = 0;
  for (int column = lane; inside && column < e.rows.columns; column += lanes) {
    const CudaLattice& lattice = e.lattice.each[0];
    float4 filtered = lattice.alpha * slice(lattice, pixel, e.rows.columns, column);
    const float4 source = e.sources[size_t(pixel) * e.rows.columns + column];
    sum += double(filtered.x) * source.x + double(filtered.y) * source.y;
    sum += double(filtered.z) * source.z + double(filtered.w) * source.w;
    if (!e.slope) continue;
    for_each_label(column, e.planes.labels, filtered,
                   [&](int label, float& value) { e.slope[e.planes.at(pixel, label)] = factor * value; });
  }
  sum = block_sum(sum, block_memory<double>());
  if (threadIdx.x == 0) e.sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kLatticeThreads)
    loss_kernel(const double* sums, int64_t count, double per_image, float* loss) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kLatticeThreads) sum += sums[i];
  sum = block_sum(sum, block_memory<double>());
  if (threadIdx.x == 0) *loss = float(per_image * sum);
}

constexpr size_t kSumMemory = kLatticeThreads / 32 * sizeof(double);

// What `images` of a batch need.
class Group {
 public:
  Group(const CrfShape& shape, const float* sigma, int64_t images, void* block)
      : workspace_(block), images_(images), energy_() {
    const uint32_t plane = uint32_t(shape.height * shape.width);
    energy_.rows = lattice_rows(shape.labels);
    energy_.planes = {uint32_t(images) * plane, plane, int(shape.labels)};
    const uint32_t pixels_a_block = kLatticeThreads >> energy_.rows.lane_bits;
    energy_.blocks = (plane + pixels_a_block - 1) / pixels_a_block;
    energy_.per_slope = float(-2.0 / double(shape.batch));
    energy_.sums = workspace_.take<double>(size_t(energy_.blocks) * shape.batch);  // the same for every group
    energy_.lattice.count = 1;
    energy_.lattice.each[0] =
        plan_lattice({5, shape.height, shape.width, {sigma[0], sigma[1], sigma[2], sigma[3], sigma[4]}}, images, 1,
                     energy_.rows, workspace_);
    energy_.sources = workspace_.take<float4>(size_t(energy_.planes.pixels) * energy_.rows.columns);
  }

  size_t bytes() const { return workspace_.bytes(); }

  void run(const float* image, const float* probs, const float* roi, float* slope, int64_t first, cudaStream_t stream) {
    energy_.lattice.each[0].image = image;
    energy_.probs = probs;
    energy_.roi = roi;
    energy_.slope = slope;
    energy_.sums += first * energy_.blocks;
    const dim3 threads(kLatticeThreads);
    const dim3 shared_out(lattice_blocks(double(energy_.planes.pixels) * (1 << energy_.rows.lane_bits)));
    build_lattices(energy_.lattice, false, stream);
    launch("sources_kernel", Launch{shared_out, threads, 0, stream}, sources_kernel, energy_);
    filter_lattices(energy_.lattice, energy_.rows, energy_.sources, stream);
    const Launch by_image{dim3(energy_.blocks * unsigned(images_)), threads, kSumMemory, stream};
    launch("slope_kernel", by_image, slope_kernel, energy_);
  }

  void add_up(const CrfShape& shape, float* loss, cudaStream_t stream) const {
    launch("loss_kernel", Launch{dim3(1), dim3(kLatticeThreads), kSumMemory, stream}, loss_kernel,
           static_cast<const double*>(energy_.sums), int64_t(energy_.blocks) * shape.batch, -1.0 / double(shape.batch),
           loss);
  }

 private:
  Workspace workspace_;
  int64_t images_;
  Energy energy_;
};

}  // namespace

size_t dense_energy_cuda_workspace(CrfShape shape, const float* sigma) {
  if (empty(shape)) return 0;
  return workspace_for_images(shape, [&](int64_t images) { return Group(shape, sigma, images, nullptr).bytes(); });
}

void dense_energy_cuda(const float* image, const float* probs, const float* roi, float* loss, float* slope,
                       CrfShape shape, const float* sigma, void* workspace, size_t workspace_bytes, void* stream) {
  const auto on_stream = static_cast<cudaStream_t>(stream);
  if (empty(shape)) return check_cuda(cudaMemsetAsync(loss, 0, sizeof(float), on_stream), "cudaMemsetAsync");
  const size_t plane = size_t(shape.height) * shape.width;
  for_each_group(
      shape, workspace_bytes, [&](int64_t images) { return Group(shape, sigma, images, nullptr).bytes(); },
      [&](int64_t first, int64_t images) {
        const size_t at = size_t(first) * shape.labels * plane;
        Group(shape, sigma, images, workspace)
            .run(image + size_t(first) * 3 * plane, probs + at, roi ? roi + size_t(first) * plane : nullptr,
                 slope ? slope + at : nullptr, first, on_stream);
      });
  Group(shape, sigma, 1, workspace).add_up(shape, loss, on_stream);
}

}  // namespace wsss
