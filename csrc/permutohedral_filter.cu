// Filtering on lattices: splat, blur. The slice is part of what uses it.
#include <algorithm>

#include "permutohedral_device.cuh"

namespace wsss {
namespace {

// Points get the sums of their lists, as far as the first cut; the parts of a list from a cut on get theirs.
__global__ void __launch_bounds__(kLatticeThreads)
    splat_kernel(const CudaLattices lattices, const LatticeRows rows, const float4* pixels) {
  const CudaLattice& lattice = lattices.each[blockIdx.y];
  const uint32_t count = lattice.totals[0], parts = count + lattice.cuts;
  for_each_row(rows, parts * uint32_t(lattice.copies), [&](uint32_t row, int lane, int lanes) {
    const uint32_t copy = row / parts, part = row - copy * parts;
    const bool is_point = part < count;
    const uint32_t cut = part - count, point = is_point ? part : lattice.point_of_cut[cut];
    const uint32_t head = lattice.first[point], begin = is_point ? head : cut * kCut;
    if (!is_point && begin == head) return;  // the point's own
    const uint32_t end = min(lattice.first[point + 1], (begin / kCut + 1) * kCut);
    float* const sums = is_point ? lattice.values[0] : lattice.cut_values;
    const size_t to = is_point ? size_t(copy) * lattice.capacity + point : size_t(copy) * lattice.cuts + cut;
    const float4* const source = pixels ? pixels + size_t(copy) * lattice.pixels * rows.columns : nullptr;
    for (int column = lane; column < rows.columns; column += lanes) {
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
      for (uint32_t i = begin; i < end; ++i) {
        const LatticeLink link = lattice.lists[i];
        const float4 value = source ? source[size_t(link.at) * rows.columns + column] : make_float4(1, 1, 1, 1);
        sum = sum + link.weight * value;
      }
      reinterpret_cast<float4*>(sums)[to * rows.columns + column] = sum;
    }
  });
}

// Points whose lists were cut get the sums of all parts. The first cut of a list does it.
__global__ void __launch_bounds__(kLatticeThreads)
    join_cuts_kernel(const CudaLattices lattices, const LatticeRows rows) {
  const CudaLattice& lattice = lattices.each[blockIdx.y];
  for_each_row(rows, lattice.cuts * uint32_t(lattice.copies), [&](uint32_t row, int lane, int lanes) {
    const uint32_t copy = row / lattice.cuts, cut = row - copy * lattice.cuts;
    const uint32_t point = lattice.point_of_cut[cut];
    if (lattice.first[point] / kCut + 1 != cut) return;
    const uint32_t last = (lattice.first[point + 1] - 1) / kCut;
    const auto parts = reinterpret_cast<const float4*>(lattice.cut_values) + size_t(copy) * lattice.cuts * rows.columns;
    const auto values =
        reinterpret_cast<float4*>(lattice.values[0]) + (size_t(copy) * lattice.capacity + point) * rows.columns;
    for (int column = lane; column < rows.columns; column += lanes) {
      float4 sum = values[column];
#pragma unroll 4
      for (uint32_t part = cut; part <= last; ++part) sum = sum + parts[size_t(part) * rows.columns + column];
      values[column] = sum;
    }
  });
}

// new = old + (lower + upper) / 2
__global__ void __launch_bounds__(kLatticeThreads)
    blur_kernel(const CudaLattices lattices, const LatticeRows rows, int axis) {
  const CudaLattice& lattice = lattices.each[blockIdx.y];
  if (axis >= lattice.vertices) return;
  const bool even = axis % 2 == 0;
  const auto from = reinterpret_cast<const float4*>(even ? lattice.values[0] : lattice.values[1]);
  const auto to = reinterpret_cast<float4*>(even ? lattice.values[1] : lattice.values[0]);
  const uint32_t count = lattice.totals[0];
  const LatticeNeighbours* const neighbours = lattice.neighbours + size_t(axis) * lattice.capacity;
  for_each_row(rows, count * uint32_t(lattice.copies), [&](uint32_t row, int lane, int lanes) {
    const uint32_t copy = row / count, point = row - copy * count;
    const LatticeNeighbours near = neighbours[point];
    const size_t first = size_t(copy) * lattice.capacity;
    for (int column = lane; column < rows.columns; column += lanes) {
      const auto value = [&](uint32_t of) {
        return of == kNoPoint ? make_float4(0, 0, 0, 0) : from[(first + of) * rows.columns + column];
      };
      to[(first + point) * rows.columns + column] = value(point) + 0.5f * (value(near.lower) + value(near.upper));
    }
  });
}

}  // namespace

LatticeRows lattice_rows(int64_t labels) {
  LatticeRows rows = {int((labels + 3) / 4), 0};
  while (rows.lane_bits < 5 && (1 << rows.lane_bits) < rows.columns) ++rows.lane_bits;
  return rows;
}

unsigned lattice_blocks(double threads) {
  constexpr int kBlocksAtOnce = 8;  // of a processor
  const double most = double(cuda_attribute(cudaDevAttrMultiProcessorCount)) * kBlocksAtOnce;
  return unsigned(std::max(1.0, std::min(most, std::ceil(threads / kLatticeThreads))));
}

void filter_lattices(const CudaLattices& lattices, LatticeRows rows, const float4* pixels, cudaStream_t stream) {
  double points = 0, cuts = 0;
  int axes = 0;
  for (int i = 0; i < lattices.count; ++i) {
    const CudaLattice& lattice = lattices.each[i];
    points = std::max(points, double(lattice.capacity) * lattice.copies);
    cuts = std::max(cuts, double(lattice.cuts) * lattice.copies);
    axes = std::max(axes, lattice.vertices);
  }
  const auto how = [&](double rows_at_most) {
    const unsigned blocks = lattice_blocks(rows_at_most * (1 << rows.lane_bits));
    return Launch{dim3(blocks, unsigned(lattices.count)), dim3(kLatticeThreads), 0, stream};
  };
  launch("splat_kernel", how(points + cuts), splat_kernel, lattices, rows, pixels);
  launch("join_cuts_kernel", how(cuts), join_cuts_kernel, lattices, rows);
  const Launch of_points = how(points);
  for (int axis = 0; axis < axes; ++axis) launch("blur_kernel", of_points, blur_kernel, lattices, rows, axis);
}

}  // namespace wsss
