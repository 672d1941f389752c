// A stable radix sort of the entries by the numbers of their points, 8 bits a pass, without atomics but those that
// count in shared memory. Three launches a pass: a histogram of every tile, its prefix sums over the tiles, a scatter.
#pragma once
#include "permutohedral_device.cuh"

namespace wsss {
namespace {

constexpr int kDigits = 256, kWarps = kLatticeThreads / 32;
constexpr int kTileRounds = 8;
constexpr uint32_t kSortTile = kLatticeThreads * kTileRounds;
constexpr size_t kSortMemory = (kWarps * kDigits + kWarps) * sizeof(uint32_t);

// The sum over the warp's threads up to this one.
__device__ inline uint32_t warp_prefix(uint32_t value) {
  const int lane = int(threadIdx.x) % 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t before = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value += before;
  }
  return value;
}

// The sum over the block's threads before this one. warp_sums: kWarps values of shared memory.
__device__ inline uint32_t block_prefix(uint32_t value, uint32_t* warp_sums) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const uint32_t inclusive = warp_prefix(value);
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  uint32_t before = inclusive - value;
  for (int w = 0; w < warp; ++w) before += warp_sums[w];
  return before;
}

// Entry of a tile that a thread takes in a round: a warp takes 32 at a time, side by side, and its rounds follow.
__device__ inline uint32_t tile_entry(uint32_t tile, int round) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  return tile * kSortTile + (warp * kTileRounds + uint32_t(round)) * 32 + lane;
}

__device__ inline uint32_t digit_of(uint64_t number, int pass) {
  return uint32_t(number >> (8 * pass)) & (kDigits - 1);
}

__global__ void __launch_bounds__(kLatticeThreads) histogram_kernel(const CudaLattices lattices, int pass) {
  const CudaLattice& lattice = lattices.each[blockIdx.y];
  const uint32_t tile = blockIdx.x;
  if (tile >= lattice.tiles || pass >= lattice.digits) return;
  uint32_t* const bins = block_memory<uint32_t>();
  bins[threadIdx.x] = 0;
  __syncthreads();
  const uint64_t* const numbers = pass % 2 == 0 ? lattice.numbers[0] : lattice.numbers[1];
  for (int round = 0; round < kTileRounds; ++round) {
    const uint32_t i = tile_entry(tile, round);
    if (i < lattice.entries) atomicAdd(&bins[digit_of(numbers[i], pass)], 1u);
  }
  __syncthreads();
  lattice.counts[size_t(threadIdx.x) * lattice.tiles + tile] = bins[threadIdx.x];
}

// Exclusive prefix sums along the rows of counts, a warp a row; totals gets the sums.
__global__ void __launch_bounds__(kLatticeThreads) prefix_kernel(const CudaLattices lattices, int pass, uint32_t rows) {
  const CudaLattice& lattice = lattices.each[blockIdx.y];
  const uint32_t which = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (pass >= lattice.digits || which >= rows) return;
  uint32_t* const row = lattice.counts + size_t(which) * lattice.tiles;
  constexpr int kEach = 8;  // values side by side
  uint32_t before = 0;
  for (uint32_t first = 0; first < lattice.tiles; first += 32 * kEach) {
    const uint32_t begin = first + lane * kEach;
    uint32_t own[kEach], sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) own[i] = begin + i < lattice.tiles ? row[begin + i] : 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum += own[i];
    const uint32_t inclusive = warp_prefix(sum);
    uint32_t at = before + inclusive - sum;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (begin + i < lattice.tiles) row[begin + i] = at;
      at += own[i];
    }
    before += __shfl_sync(0xffffffffu, inclusive, 31);
  }
  if (lane == 0) lattice.totals[which] = before;
}

// The lanes that are inside and have the same digit.
__device__ inline uint32_t lanes_alike(bool inside, uint32_t digit) {
  uint32_t alike = __ballot_sync(0xffffffffu, inside);
#pragma unroll
  for (int bit = 0; bit < 8; ++bit) {
    const bool set = digit >> bit & 1;
    const uint32_t vote = __ballot_sync(0xffffffffu, set);
    alike &= set ? vote : ~vote;
  }
  return alike;
}

__global__ void __launch_bounds__(kLatticeThreads) scatter_kernel(const CudaLattices lattices, int pass) {
  const CudaLattice& lattice = lattices.each[blockIdx.y];
  const uint32_t tile = blockIdx.x;
  if (tile >= lattice.tiles || pass >= lattice.digits) return;
  uint32_t* const bins = block_memory<uint32_t>();  // [warp][digit] how many so far; then where they go
  for (int w = 0; w < kWarps; ++w) bins[w * kDigits + threadIdx.x] = 0;
  __syncthreads();
  const bool even = pass % 2 == 0;
  const uint64_t* const numbers = even ? lattice.numbers[0] : lattice.numbers[1];
  const uint32_t* const order = even ? lattice.order[0] : lattice.order[1];
  const uint32_t lane = threadIdx.x % 32;
  uint32_t* const own = bins + threadIdx.x / 32 * kDigits;
  uint64_t number[kTileRounds];
  uint32_t entry[kTileRounds], rank[kTileRounds];
#pragma unroll
  for (int round = 0; round < kTileRounds; ++round) {
    const uint32_t i = tile_entry(tile, round);
    const bool inside = i < lattice.entries;
    number[round] = inside ? numbers[i] : 0;
    entry[round] = !inside ? 0 : pass == 0 ? i : order[i];
    const uint32_t digit = digit_of(number[round], pass);
    const uint32_t alike = lanes_alike(inside, digit);
    const uint32_t before = own[digit];
    __syncwarp();
    if (inside && lane == uint32_t(__ffs(int(alike))) - 1) own[digit] = before + uint32_t(__popc(alike));
    __syncwarp();
    rank[round] = before + uint32_t(__popc(alike & ((1u << lane) - 1)));
  }
  // The block meets in block_prefix: the counts are whole then.
  uint32_t at = block_prefix(lattice.totals[threadIdx.x], bins + kWarps * kDigits) +
                lattice.counts[size_t(threadIdx.x) * lattice.tiles + tile];
  for (int w = 0; w < kWarps; ++w) {
    const uint32_t count = bins[w * kDigits + threadIdx.x];
    bins[w * kDigits + threadIdx.x] = at;
    at += count;
  }
  __syncthreads();
  uint64_t* const sorted_numbers = even ? lattice.numbers[1] : lattice.numbers[0];
  uint32_t* const sorted_order = even ? lattice.order[1] : lattice.order[0];
#pragma unroll
  for (int round = 0; round < kTileRounds; ++round) {
    if (tile_entry(tile, round) >= lattice.entries) break;
    const uint32_t to = own[digit_of(number[round], pass)] + rank[round];
    sorted_numbers[to] = number[round];
    sorted_order[to] = entry[round];
  }
}

}  // namespace
}  // namespace wsss
