// The walk's inner loops, one table per instruction set; random_walk.cpp chooses the table and runs the steps.
//
// Pixels are striped over the lanes: with `lanes` lanes and blocks = ceil(width / lanes), lane l of the vector at
// position t of a row is column l * blocks + t. A neighbour dx columns away is then the vector dx positions away, so
// every load is aligned; positions [-halo, 0) and [blocks, blocks + halo) of a row repeat its ends one lane over.
#pragma once
#include <cstddef>

#include "common/neighbourhood.h"

namespace wsss {

constexpr int kMaxWalkMaps = 5;  // maps walked together; their sums fill the registers

// Where everything lies. Plain data, no ownership. Offsets are in vectors.
template <class T>
struct WalkPlan {
  int height, width, radius, halo, lanes, blocks;
  int weights_per_row;        // vectors of weights in a row
  int slot[kMaxNeighbours];   // of neighbour k within a position, sorted by dx
  const ptrdiff_t* position;  // [blocks + 2 * halo]: where slot 0 of position t - halo would lie, in values
  T* weights;                 // [halo + height][weights_per_row] vectors, the first halo rows zero
  T* inverse;                 // [height][blocks] vectors, 1 / degree
  T* gradient;                // as weights, or null

  WSSS_ALWAYS_INLINE size_t weight_row(int y) const { return size_t(y + halo) * weights_per_row * lanes; }
  WSSS_ALWAYS_INLINE size_t inverse_row(int y) const { return size_t(y) * blocks * lanes; }
  // States hold [halo + height + halo][halo + blocks + halo][maps] vectors.
  WSSS_ALWAYS_INLINE size_t state_row(int y, int maps) const {
    return size_t(y + halo) * (blocks + 2 * halo) * maps * lanes;
  }
  WSSS_ALWAYS_INLINE size_t state_size(int maps) const {
    return size_t(height + 2 * halo) * (blocks + 2 * halo) * maps * lanes;
  }
};

// next = scale * P state + previous_scale * next + add_scale * add;  sum += sum_scale * next
template <class T>
struct WalkStep {
  const T* state;
  T* next;
  T scale, previous_scale;
  const T* add;
  T add_scale;
  T* sum;
  T sum_scale;
};

template <class T>
struct WalkKernels {
  int lanes;
  // Rows [begin, end) of affinity^beta into plan.weights. scratch holds at least scratch_size(plan) values.
  void (*pack_weights)(const WalkPlan<T>&, const float* affinity, double beta, T* scratch, int begin, int end);
  // 1 / (1 + sum of weights), summed in double; needs the weights of rows [begin - halo, end).
  void (*invert_degrees)(const WalkPlan<T>&, int begin, int end);
  void (*pack_maps)(const WalkPlan<T>&, const float* const* maps, int count, T* state, T* scratch, int begin, int end);
  void (*unpack_maps)(const WalkPlan<T>&, const T* state, int count, float* const* maps, T* scratch, int begin,
                      int end);
  void (*step[kMaxWalkMaps + 1])(const WalkPlan<T>&, const WalkStep<T>&, int begin, int end);
  // state * (degree, or 1 / degree), in place.
  void (*scale_by_degree)(const WalkPlan<T>&, T* state, int count, bool inverse, int begin, int end);
  // plan.gradient += scale * sum over maps of b_i (x_j - q_i) + b_j (x_i - q_j), q = (P x) for every pair (i, j).
  void (*outer[kMaxWalkMaps + 1])(const WalkPlan<T>&, const T* b, const T* x, const T* q, T scale, int begin, int end);
  // gradient of W -> gradient of the affinity, rows [begin, end).
  void (*unpack_gradient)(const WalkPlan<T>&, const float* affinity, double beta, float* grad, T* scratch, int begin,
                          int end);
};

template <class T>
WSSS_ALWAYS_INLINE size_t walk_scratch_size(const WalkPlan<T>& plan) {
  return size_t(plan.lanes) * (plan.blocks + plan.lanes) + 2 * size_t(plan.halo) + 2 * size_t(plan.lanes);
}

template <class T>
const WalkKernels<T>& walk_kernels();  // of the best instruction set this processor has

}  // namespace wsss
