// Building lattices: the simplices of all pixels, their vertices sorted into points, the points' neighbours.
#include <algorithm>
#include <stdexcept>

#include "permutohedral_cuda.h"
#include "permutohedral_range.h"
#include "permutohedral_sort.cuh"

namespace wsss {
namespace {

// Simplex of one vector. Order of operations and roundings as in reference/permutohedral.py, and no fused
// multiplications: which simplex a vector falls into is decided by rounding.
template <int D>
__device__ __forceinline__ void find_simplex(const CudaLattice& lattice, const float (&feature)[D], uint32_t pixel) {
  float elevated[D + 1], base[D + 1], offset[D + 1], total = 0, surplus = 0;
  int rank[D + 1];
#pragma unroll
  for (int j = D; j > 0; --j) {
    const float c = __fmul_rn(feature[j - 1], lattice.scale[j - 1]);
    elevated[j] = __fsub_rn(total, __fmul_rn(c, float(j)));
    total = __fadd_rn(total, c);
  }
  elevated[0] = total;
#pragma unroll
  for (int i = 0; i <= D; ++i) {
    base[i] = rintf(__fmul_rn(elevated[i], float(1.0 / (D + 1))));
    offset[i] = __fsub_rn(elevated[i], __fmul_rn(base[i], float(D + 1)));
    surplus += base[i];
    rank[i] = 0;
  }
#pragma unroll
  for (int i = 0; i < D; ++i) {
#pragma unroll
    for (int j = i + 1; j <= D; ++j) {
      const bool less = offset[i] < offset[j];
      rank[i] += less;
      rank[j] += !less;
    }
  }
  float sorted[D + 1];  // smallest offset first, in units of D + 1
  uint64_t number = 0;
#pragma unroll
  for (int i = 0; i <= D; ++i) {
    rank[i] += int(surplus);
    const int wrap = rank[i] < 0 ? 1 : rank[i] > D ? -1 : 0;
    rank[i] += wrap * (D + 1);
    base[i] += float(wrap);
    const float step = __fmul_rn(__fsub_rn(elevated[i], __fmul_rn(base[i], float(D + 1))), float(1.0 / (D + 1)));
#pragma unroll
    for (int p = 0; p <= D; ++p) sorted[p] = i == 0 || rank[i] == D - p ? step : sorted[p];
    if (i < D) number += uint64_t(int(base[i]) - lattice.low[i]) * lattice.unit[i];
  }
  LatticeLink* const links = lattice.links + size_t(pixel) * (D + 1);
#pragma unroll
  for (int k = 0; k <= D; ++k) {
    links[k].weight = k == 0 ? __fadd_rn(sorted[0], __fsub_rn(1.0f, sorted[D])) : __fsub_rn(sorted[k], sorted[k - 1]);
    // Vertex k is vertex 0, k on, but for the k coordinates of the highest ranks, whose q is lower by 1.
    uint64_t vertex = number;
#pragma unroll
    for (int i = 0; i < D; ++i) vertex -= rank[i] > D - k ? lattice.unit[i] : 0;
    lattice.numbers[0][size_t(k) * lattice.pixels + pixel] = vertex;
  }
}

__global__ void __launch_bounds__(kLatticeThreads) simplices_kernel(const CudaLattices lattices) {
  const CudaLattice& lattice = lattices.each[blockIdx.y];
  const uint32_t pixel = blockIdx.x * kLatticeThreads + threadIdx.x;
  if (pixel >= lattice.pixels) return;
  const uint32_t image = pixel / lattice.plane, place = pixel - image * lattice.plane;
  const uint32_t y = place / uint32_t(lattice.width), x = place - y * uint32_t(lattice.width);
  const float at_x = __fdiv_rn(float(x), lattice.sigma[0]), at_y = __fdiv_rn(float(y), lattice.sigma[1]);
  if (lattice.vertices == 3) {
    const float feature[2] = {at_x, at_y};
    find_simplex<2>(lattice, feature, pixel);
  } else {
    float feature[5] = {at_x, at_y};
#pragma unroll
    for (int i = 2; i < 5; ++i) {
      const float colour = lattice.image[(size_t(image) * 3 + (i - 2)) * lattice.plane + place];
      feature[i] = __fdiv_rn(colour > 0 ? fminf(colour, 255.0f) : 0.0f, lattice.sigma[i]);  // NaN: 0
    }
    find_simplex<5>(lattice, feature, pixel);
  }
}

struct Sorted {
  const uint64_t* numbers;
  const uint32_t* order;
};
__device__ __forceinline__ Sorted sorted_entries(const CudaLattice& lattice) {
  const bool even = lattice.digits % 2 == 0;
  return {even ? lattice.numbers[0] : lattice.numbers[1], even ? lattice.order[0] : lattice.order[1]};
}

// Whether a point's list begins there. An entry by the size of an image is its segment: remainder x images + image.
__device__ __forceinline__ bool is_head(const CudaLattice& lattice, const Sorted& sorted, uint32_t i) {
  return i == 0 || sorted.numbers[i] != sorted.numbers[i - 1] ||
         sorted.order[i] / lattice.plane != sorted.order[i - 1] / lattice.plane;
}

__global__ void __launch_bounds__(kLatticeThreads) count_points_kernel(const CudaLattices lattices) {
  const CudaLattice& lattice = lattices.each[blockIdx.y];
  if (blockIdx.x >= lattice.tiles) return;
  const Sorted sorted = sorted_entries(lattice);
  int count = 0;
  for (int round = 0; round < kTileRounds; ++round) {
    const uint32_t i = tile_entry(blockIdx.x, round);
    count += __syncthreads_count(i < lattice.entries && is_head(lattice, sorted, i));
  }
  if (threadIdx.x == 0) lattice.counts[blockIdx.x] = uint32_t(count);
}

// Numbers the points, and fills the lists and the pixels' links.
__global__ void __launch_bounds__(kLatticeThreads) number_points_kernel(const CudaLattices lattices) {
  const CudaLattice& lattice = lattices.each[blockIdx.y];
  if (blockIdx.x >= lattice.tiles) return;
  const Sorted sorted = sorted_entries(lattice);
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t* const heads_of_warp = block_memory<uint32_t>();
  uint32_t heads[kTileRounds], count = 0;
#pragma unroll
  for (int round = 0; round < kTileRounds; ++round) {
    const uint32_t i = tile_entry(blockIdx.x, round);
    heads[round] = __ballot_sync(0xffffffffu, i < lattice.entries && is_head(lattice, sorted, i));
    count += uint32_t(__popc(heads[round]));
  }
  if (lane == 0) heads_of_warp[warp] = count;
  __syncthreads();
  uint32_t next = lattice.counts[blockIdx.x];
  for (uint32_t w = 0; w < warp; ++w) next += heads_of_warp[w];
#pragma unroll
  for (int round = 0; round < kTileRounds; ++round) {
    const uint32_t i = tile_entry(blockIdx.x, round);
    const uint32_t up_to_here = (2u << lane) - 1;
    const uint32_t point = next + uint32_t(__popc(heads[round] & up_to_here)) - 1;
    next += uint32_t(__popc(heads[round]));
    if (i >= lattice.entries) break;
    const uint32_t entry = sorted.order[i], k = entry / lattice.pixels, pixel = entry - k * lattice.pixels;
    LatticeLink& link = lattice.links[size_t(pixel) * lattice.vertices + k];
    link.at = point;
    lattice.lists[i] = {pixel, link.weight};
    if (i % kCut == 0) lattice.point_of_cut[i / kCut] = point;
    if (i == lattice.entries - 1) lattice.first[point + 1] = lattice.entries;
    if (!(heads[round] >> lane & 1)) continue;
    lattice.first[point] = i;
    lattice.point_numbers[point] = sorted.numbers[i];
    lattice.segments[point] = entry / lattice.plane;
    for (int axis = 0; axis < lattice.vertices; ++axis) {
      lattice.neighbours[size_t(axis) * lattice.capacity + point].upper = kNoPoint;
    }
  }
}

// Along an axis the lower neighbour is one less in every coordinate but that of the axis, where it is dim more. The
// upper one's link is this, reversed.
__global__ void __launch_bounds__(kLatticeThreads) neighbours_kernel(const CudaLattices lattices) {
  const CudaLattice& lattice = lattices.each[blockIdx.y];
  const uint32_t count = lattice.totals[0];
  const uint64_t all = uint64_t(count) * lattice.vertices;
  for (uint64_t i = uint64_t(blockIdx.x) * kLatticeThreads + threadIdx.x; i < all;
       i += uint64_t(gridDim.x) * kLatticeThreads) {
    const uint32_t axis = uint32_t(i / count), point = uint32_t(i - uint64_t(axis) * count);
    const uint32_t images = lattice.images, from = lattice.segments[point];
    const bool wraps = from < images;  // remainder 0: dim comes before it
    const uint32_t segment = wraps ? from + uint32_t(lattice.vertices - 1) * images : from - images;
    const uint64_t number = lattice.point_numbers[point] + lattice.unit[axis] - (wraps ? lattice.every : 0);
    uint32_t low = 0, high = count;  // the first point not before it
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      const uint64_t there = lattice.point_numbers[middle];
      const bool before = there != number ? there < number : lattice.segments[middle] < segment;
      if (before) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    const bool found = low < count && lattice.point_numbers[low] == number && lattice.segments[low] == segment;
    LatticeNeighbours* const own = lattice.neighbours + size_t(axis) * lattice.capacity;
    own[point].lower = found ? low : kNoPoint;
    if (found) own[low].upper = point;
  }
}

// norm = 1 / sqrt(filter of ones + 1e-20), which becomes part of the weights.
__global__ void __launch_bounds__(kLatticeThreads) normalize_links_kernel(const CudaLattices lattices) {
  const CudaLattice& lattice = lattices.each[blockIdx.y];
  const uint32_t pixel = blockIdx.x * kLatticeThreads + threadIdx.x;
  if (pixel >= lattice.pixels) return;
  const float norm = 1 / sqrtf(lattice.alpha * slice(lattice, pixel, 1, 0).x + 1e-20f);
  lattice.norms[pixel] = norm;
  for (int k = 0; k < lattice.vertices; ++k) lattice.links[size_t(pixel) * lattice.vertices + k].weight *= norm;
}

__global__ void __launch_bounds__(kLatticeThreads) normalize_lists_kernel(const CudaLattices lattices) {
  const CudaLattice& lattice = lattices.each[blockIdx.y];
  const uint32_t i = blockIdx.x * kLatticeThreads + threadIdx.x;
  if (i < lattice.entries) lattice.lists[i].weight *= lattice.norms[lattice.lists[i].at];
}

uint32_t parts(uint32_t count, uint32_t size) { return (count + size - 1) / size; }

}  // namespace

CudaLattice plan_lattice(const LatticeSpace& space, int64_t images, int64_t copies, LatticeRows rows,
                         Workspace& workspace) {
  const int dim = space.dim;
  const LatticeRange range = lattice_range(space);
  CudaLattice lattice = {};
  lattice.vertices = dim + 1;
  lattice.images = int(images);
  lattice.copies = int(copies);
  lattice.width = int(space.width);
  lattice.alpha = 1.0f / (1.0f + std::ldexp(1.0f, -dim));
  uint64_t numbers = 1;
  for (int i = 0; i < dim; ++i) {
    lattice.sigma[i] = space.sigma[i];
    lattice.scale[i] = float(lattice_scale(dim, i));
    lattice.low[i] = range.low[i];
    lattice.unit[i] = numbers;
    lattice.every += numbers;
    if (double(numbers) * range.values[i] > 0x1p62) {
      throw std::invalid_argument("the sigmas are too small for an image of this size");
    }
    numbers *= uint64_t(range.values[i]);
  }
  for (uint64_t left = numbers - 1; left > 0; left /= kDigits) ++lattice.digits;
  const int64_t plane = space.height * space.width, entries = plane * images * lattice.vertices;
  lattice.plane = uint32_t(plane);
  lattice.pixels = uint32_t(plane * images);
  lattice.entries = uint32_t(entries);
  lattice.tiles = parts(lattice.entries, kSortTile);
  lattice.cuts = parts(lattice.entries, kCut);
  lattice.capacity = uint32_t(std::min(double(entries), double(numbers) * lattice.vertices * double(images)));
  const size_t points = lattice.capacity, row = size_t(rows.columns) * 4;
  lattice.links = workspace.take<LatticeLink>(entries);
  lattice.lists = workspace.take<LatticeLink>(entries);
  for (int i = 0; i < 2; ++i) {
    lattice.numbers[i] = workspace.take<uint64_t>(entries);
    lattice.order[i] = workspace.take<uint32_t>(entries);
    lattice.values[i] = workspace.take<float>(points * copies * row);
  }
  lattice.cut_values = workspace.take<float>(size_t(lattice.cuts) * copies * row);
  lattice.counts = workspace.take<uint32_t>(size_t(lattice.tiles) * kDigits);
  lattice.totals = workspace.take<uint32_t>(kDigits);
  lattice.first = workspace.take<uint32_t>(points + 1);
  lattice.point_of_cut = workspace.take<uint32_t>(lattice.cuts);
  lattice.point_numbers = workspace.take<uint64_t>(points);
  lattice.segments = workspace.take<uint32_t>(points);
  lattice.neighbours = workspace.take<LatticeNeighbours>(points * lattice.vertices);
  lattice.norms = workspace.take<float>(lattice.pixels);
  return lattice;
}

void build_lattices(const CudaLattices& lattices, bool normalized, cudaStream_t stream) {
  uint32_t tiles = 0, pixels = 0, entries = 0;
  int digits = 0;
  for (int i = 0; i < lattices.count; ++i) {
    const CudaLattice& lattice = lattices.each[i];
    tiles = std::max(tiles, lattice.tiles);
    pixels = std::max(pixels, lattice.pixels);
    entries = std::max(entries, lattice.entries);
    digits = std::max(digits, lattice.digits);
  }
  const auto how = [&](uint32_t blocks, size_t shared) {
    return Launch{dim3(blocks, unsigned(lattices.count)), dim3(kLatticeThreads), shared, stream};
  };
  const Launch of_pixels = how(parts(pixels, kLatticeThreads), 0);
  launch("simplices_kernel", of_pixels, simplices_kernel, lattices);
  for (int pass = 0; pass < digits; ++pass) {
    launch("histogram_kernel", how(tiles, kDigits * sizeof(uint32_t)), histogram_kernel, lattices, pass);
    launch("prefix_kernel", how(kDigits / kWarps, 0), prefix_kernel, lattices, pass, uint32_t(kDigits));
    launch("scatter_kernel", how(tiles, kSortMemory), scatter_kernel, lattices, pass);
  }
  launch("count_points_kernel", how(tiles, 0), count_points_kernel, lattices);
  launch("prefix_kernel", how(1, 0), prefix_kernel, lattices, 0, 1u);
  launch("number_points_kernel", how(tiles, kWarps * sizeof(uint32_t)), number_points_kernel, lattices);
  launch("neighbours_kernel", how(lattice_blocks(double(entries)), 0), neighbours_kernel, lattices);
  if (!normalized) return;
  CudaLattices of_ones = lattices;
  for (int i = 0; i < lattices.count; ++i) of_ones.each[i].copies = 1;
  filter_lattices(of_ones, lattice_rows(1), nullptr, stream);
  launch("normalize_links_kernel", of_pixels, normalize_links_kernel, lattices);
  launch("normalize_lists_kernel", how(parts(entries, kLatticeThreads), 0), normalize_lists_kernel, lattices);
}

}  // namespace wsss
