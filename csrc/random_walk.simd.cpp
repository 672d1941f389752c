#include "common/simd_math.h"
#include "random_walk_kernels.h"

namespace wsss {
namespace WSSS_ISA {

// Where offset (dy, dx) lies within a position: offsets sorted by dx, then dy.
constexpr int slot_index(int radius, int dy, int dx) {
  int index = 0;
  for (int y = 0; y < radius; ++y) {
    const int reach = stencil_reach(radius, y);
    for (int x = y == 0 ? 1 : -reach; x <= reach; ++x) {
      if (x < dx || (x == dx && y < dy)) ++index;
    }
  }
  return index;
}
template <int R, int DY, int DX>
inline constexpr int kSlot = slot_index(R, DY, DX);

// A row of a map as the lanes see it: `halo` zeros, the row, zeros to the end.
template <class T>
WSSS_ALWAYS_INLINE T* row_in_scratch(const WalkPlan<T>& plan, T* scratch, const float* row) {
  T* line = scratch + plan.halo;
  const size_t end = walk_scratch_size(plan);
  for (int i = 0; i < plan.halo; ++i) scratch[i] = 0;
  if (row) {
    for (int x = 0; x < plan.width; ++x) line[x] = T(row[x]);
  }
  for (size_t i = plan.halo + (row ? plan.width : 0); i < end; ++i) scratch[i] = 0;
  return line;
}

// Vectors of positions [first, last] of a line; emit(position, vector).
template <class T, class Emit>
WSSS_ALWAYS_INLINE void stripe(const WalkPlan<T>& plan, const T* line, int first, int last, Emit&& emit) {
  constexpr int n = kLanes<T>;
  Vec<T> rows[n];
  for (int t = first; t <= last; t += n) {
    unroll<0, n>([&](auto l) __attribute__((always_inline)) { rows[l] = load(line + l * plan.blocks + t); });
    transpose<T>(rows);
    const int count = last - t + 1 < n ? last - t + 1 : n;
    for (int i = 0; i < count; ++i) emit(t + i, rows[i]);
  }
}

// The way back: fetch(position) of every block into a line. Late groups first, and lanes in order: what a group writes
// past its end is written again by the group it belongs to.
template <class T, class Fetch>
WSSS_ALWAYS_INLINE void unstripe(const WalkPlan<T>& plan, T* line, Fetch&& fetch) {
  constexpr int n = kLanes<T>;
  Vec<T> rows[n];
  for (int t = (plan.blocks - 1) / n * n; t >= 0; t -= n) {
    for (int i = 0; i < n; ++i) rows[i] = t + i < plan.blocks ? fetch(t + i) : Vec<T>{};
    transpose<T>(rows);
    unroll<0, n>([&](auto l) __attribute__((always_inline)) { store(line + l * plan.blocks + t, rows[l]); });
  }
}

// Zero where offset k leads out of the map.
template <class T>
WSSS_ALWAYS_INLINE void clear_outside(const WalkPlan<T>& plan, T* line, int y, int dy, int dx) {
  const int first = dx < 0 ? -dx : 0, last = dx > 0 ? plan.width - dx : plan.width;
  for (int x = 0; x < plan.width; ++x) {
    if (y + dy >= plan.height || x < first || x >= last) line[x] = 0;
  }
}

template <class T>
WSSS_ALWAYS_INLINE size_t padded_width(const WalkPlan<T>& plan) {
  return (size_t(plan.width) + kLanes<float> - 1) / kLanes<float> * kLanes<float>;
}

template <class T>
void pack_weights(const WalkPlan<T>& plan, const float* affinity, double beta, T* scratch, int begin, int end) {
  const size_t plane = size_t(plan.height) * plan.width;
  for (int y = begin; y < end; ++y) {
    T* const out = plan.weights + plan.weight_row(y);
    for (int dy = 0, k = 0; dy < plan.radius; ++dy) {
      const int reach = stencil_reach(plan.radius, dy);
      for (int dx = dy == 0 ? 1 : -reach; dx <= reach; ++dx, ++k) {
        const bool inside = y + dy < plan.height;
        T* const line = row_in_scratch(plan, scratch, inside ? affinity + k * plane + size_t(y) * plan.width : nullptr);
        if (inside) {
          clear_outside(plan, line, y, dy, dx);
          power(line, padded_width(plan), beta);
        }
        const int first = dx > 0 ? -dx : 0, last = plan.blocks - 1 + (dx < 0 ? -dx : 0), slot = plan.slot[k];
        stripe(plan, line, first, last, [&](int t, Vec<T> v) __attribute__((always_inline)) {
          store(out + plan.position[t + plan.halo] + slot * kLanes<T>, v);
        });
      }
    }
  }
}

template <class T>
void invert_degrees(const WalkPlan<T>& plan, int begin, int end) {
  constexpr int n = kLanes<T>;
  const Neighbourhood hood = make_neighbourhood(plan.radius);
  for (int y = begin; y < end; ++y) {
    for (int j = 0; j < plan.blocks; ++j) {
      double degree[n];
      for (int l = 0; l < n; ++l) degree[l] = 1;
      for (int k = 0; k < hood.count; ++k) {
        const T* to = plan.weights + plan.weight_row(y) + plan.position[j + plan.halo] + plan.slot[k] * n;
        const T* from = plan.weights + plan.weight_row(y - hood.dy[k]) + plan.position[j - hood.dx[k] + plan.halo] +
                        plan.slot[k] * n;
        for (int l = 0; l < n; ++l) degree[l] += double(to[l]) + double(from[l]);
      }
      T* const inverse = plan.inverse + plan.inverse_row(y) + size_t(j) * n;
      for (int l = 0; l < n; ++l) inverse[l] = T(1 / degree[l]);
    }
  }
}

template <class T>
void pack_maps(const WalkPlan<T>& plan, const float* const* maps, int count, T* state, T* scratch, int begin, int end) {
  for (int y = begin; y < end; ++y) {
    T* const row = state + plan.state_row(y, count);
    for (int c = 0; c < count; ++c) {
      const T* line = row_in_scratch(plan, scratch, maps[c] + size_t(y) * plan.width);
      stripe(plan, line, -plan.halo, plan.blocks + plan.halo - 1, [&](int t, Vec<T> v) __attribute__((always_inline)) {
        store(row + size_t((t + plan.halo) * count + c) * kLanes<T>, v);
      });
    }
  }
}

template <class T>
void unpack_maps(const WalkPlan<T>& plan, const T* state, int count, float* const* maps, T* scratch, int begin,
                 int end) {
  for (int y = begin; y < end; ++y) {
    const T* const row = state + plan.state_row(y, count) + size_t(plan.halo) * count * kLanes<T>;
    for (int c = 0; c < count; ++c) {
      unstripe(plan, scratch,
               [&](int t) __attribute__((always_inline)) { return load(row + size_t(t * count + c) * kLanes<T>); });
      float* const out = maps[c] + size_t(y) * plan.width;
      for (int x = 0; x < plan.width; ++x) out[x] = float(scratch[x]);
    }
  }
}

// The positions outside [0, blocks) repeat those a lane over, from the row outwards: where there are fewer blocks than
// halo positions, one of these in turn. Past the first and last lane lies zero.
template <class T, int C>
WSSS_ALWAYS_INLINE void fill_halo(const WalkPlan<T>& plan, T* row) {
  constexpr int n = kLanes<T>;
  const size_t size = size_t(plan.halo) * C * n;
  T* const inside = row + size;
  T* const end = inside + size_t(plan.blocks) * C * n;
  for (size_t i = n; i <= size; i += n) store(inside - i, previous_lane<T>(load(end - i)));
  for (size_t i = 0; i < size; i += n) store(end + i, next_lane<T>(load(inside + i)));
}

// sum over neighbours of W (x_j - x_i), for P positions of C maps, all in registers.
template <class T, int C, int P, int R>
WSSS_ALWAYS_INLINE void neighbour_sum(const WalkPlan<T>& plan, const T* state, int y, int j, Vec<T>* centre,
                                      Vec<T>* sum) {
  constexpr int n = kLanes<T>;
  const ptrdiff_t stride = ptrdiff_t(plan.blocks + 2 * plan.halo) * C * n;
  const T* const here = state + plan.state_row(y, C) + size_t(j + plan.halo) * C * n;
  const ptrdiff_t* const position = plan.position + j + plan.halo;
  const T* const weights = plan.weights + plan.weight_row(y);
  unroll<0, C * P>([&](auto i) __attribute__((always_inline)) {
    centre[i] = load(here + i * n);
    sum[i] = Vec<T>{};
  });
  unroll<0, R>([&](auto dy) __attribute__((always_inline)) {
    constexpr int DY = dy.value, reach = stencil_reach(R, DY);
    const T* const below = here + DY * stride;
    const T* const above = here - DY * stride;
    const T* const weights_above = weights - size_t(DY) * plan.weights_per_row * n;
    unroll<0, P + 2 * reach>([&](auto shifted) __attribute__((always_inline)) {
      constexpr int t = shifted.value - reach;
      Vec<T> x[C];
      if constexpr (DY > 0 || P > 1 || t != 0) {
        unroll<0, C>([&](auto c)
                         __attribute__((always_inline)) { x[c] = in_register<T>(load(below + (t * C + c) * n)); });
        unroll<0, P>([&](auto p) __attribute__((always_inline)) {
          constexpr int dx = t - p.value;
          if constexpr (dx >= -reach && dx <= reach && (DY > 0 || dx != 0)) {
            const T* const w = DY > 0 || dx > 0 ? weights + position[p] + kSlot<R, DY, dx> * n
                                                : weights + position[t] + kSlot<R, DY, -dx> * n;
            const Vec<T> link = load(w);
            unroll<0, C>([&](auto c)
                             __attribute__((always_inline)) { sum[p * C + c] += link * (x[c] - centre[p * C + c]); });
          }
        });
      }
      if constexpr (DY > 0) {
        unroll<0, C>([&](auto c)
                         __attribute__((always_inline)) { x[c] = in_register<T>(load(above + (t * C + c) * n)); });
        unroll<0, P>([&](auto p) __attribute__((always_inline)) {
          constexpr int dx = p.value - t;  // of the offset that leads here from the row above
          if constexpr (dx >= -reach && dx <= reach) {
            const Vec<T> link = load(weights_above + position[t] + kSlot<R, DY, dx> * n);
            unroll<0, C>([&](auto c)
                             __attribute__((always_inline)) { sum[p * C + c] += link * (x[c] - centre[p * C + c]); });
          }
        });
      }
    });
  });
}

// The same for any radius, one position at a time.
template <class T, int C>
WSSS_ALWAYS_INLINE void neighbour_sum_any_radius(const WalkPlan<T>& plan, const T* state, int y, int j, Vec<T>* centre,
                                                 Vec<T>* sum) {
  constexpr int n = kLanes<T>;
  const ptrdiff_t stride = ptrdiff_t(plan.blocks + 2 * plan.halo) * C * n;
  const T* const here = state + plan.state_row(y, C) + size_t(j + plan.halo) * C * n;
  const ptrdiff_t* const position = plan.position + j + plan.halo;
  for (int c = 0; c < C; ++c) {
    centre[c] = load(here + c * n);
    sum[c] = Vec<T>{};
  }
  for (int dy = 0, k = 0; dy < plan.radius; ++dy) {
    const int reach = stencil_reach(plan.radius, dy);
    for (int dx = dy == 0 ? 1 : -reach; dx <= reach; ++dx, ++k) {
      const Vec<T> to = load(plan.weights + plan.weight_row(y) + position[0] + plan.slot[k] * n);
      const Vec<T> from = load(plan.weights + plan.weight_row(y - dy) + position[-dx] + plan.slot[k] * n);
      const ptrdiff_t shift = dy * stride + ptrdiff_t(dx) * C * n;
      for (int c = 0; c < C; ++c) {
        sum[c] += to * (load(here + shift + c * n) - centre[c]);
        sum[c] += from * (load(here - shift + c * n) - centre[c]);
      }
    }
  }
}

template <class T, int C, int P, int R>
WSSS_ALWAYS_INLINE void step_positions(const WalkPlan<T>& plan, const WalkStep<T>& step, int y, int j) {
  constexpr int n = kLanes<T>;
  Vec<T> centre[C * P], sum[C * P];
  if constexpr (R > 0) {
    neighbour_sum<T, C, P, R>(plan, step.state, y, j, centre, sum);
  } else {
    neighbour_sum_any_radius<T, C>(plan, step.state, y, j, centre, sum);
  }
  const size_t at = plan.state_row(y, C) + size_t(j + plan.halo) * C * n;
  const T* const inverse = plan.inverse + plan.inverse_row(y) + size_t(j) * n;
  T* const next = step.next + at;
  unroll<0, P>([&](auto p) __attribute__((always_inline)) {
    const Vec<T> inv = load(inverse + p * n);
    unroll<0, C>([&](auto c) __attribute__((always_inline)) {
      sum[p * C + c] = step.scale * (centre[p * C + c] + inv * sum[p * C + c]);
    });
  });
  if (step.previous_scale != 0) {
    unroll<0, C * P>([&](auto i)
                         __attribute__((always_inline)) { sum[i] += step.previous_scale * load(next + i * n); });
  }
  if (step.add) {
    const T* const add = step.add + at;
    unroll<0, C * P>([&](auto i) __attribute__((always_inline)) { sum[i] += step.add_scale * load(add + i * n); });
  }
  unroll<0, C * P>([&](auto i) __attribute__((always_inline)) { store(next + i * n, sum[i]); });
  if (step.sum) {
    T* const total = step.sum + at;
    unroll<0, C * P>([&](auto i) __attribute__((always_inline)) {
      store(total + i * n, load(total + i * n) + step.sum_scale * sum[i]);
    });
  }
}

// Positions a block: as many as leave sums, centres and operands in registers.
template <int C>
constexpr int positions_per_block() {
  if (WSSS_VECTOR_BYTES < 64) return C <= 2 ? 2 : 1;  // 16 registers
  return C <= 3 ? 4 : 2;                              // 32 registers
}

template <class T, int C, int R>
WSSS_ALWAYS_INLINE void step_rows(const WalkPlan<T>& plan, const WalkStep<T>& step, int begin, int end) {
  constexpr int most = R > 0 ? positions_per_block<C>() : 1;
  for (int y = begin; y < end; ++y) {
    for (int j = 0; j < plan.blocks;) {
      // Even shares: a position by itself waits for its own sums.
      const int left = plan.blocks - j, shares = (left + most - 1) / most, share = (left + shares - 1) / shares;
      unroll<1, most + 1>([&](auto positions) __attribute__((always_inline)) {
        if (positions.value == share) step_positions<T, C, positions.value, R>(plan, step, y, j);
      });
      j += share;
    }
    fill_halo<T, C>(plan, step.next + plan.state_row(y, C));
  }
}

template <class T, int C>
void step(const WalkPlan<T>& plan, const WalkStep<T>& step, int begin, int end) {
  if (plan.radius == 5) {
    step_rows<T, C, 5>(plan, step, begin, end);
  } else {
    step_rows<T, C, 0>(plan, step, begin, end);
  }
}

template <class T, int C>
WSSS_ALWAYS_INLINE void scale_rows(const WalkPlan<T>& plan, T* state, bool inverse, int begin, int end) {
  constexpr int n = kLanes<T>;
  for (int y = begin; y < end; ++y) {
    T* const row = state + plan.state_row(y, C);
    for (int j = 0; j < plan.blocks; ++j) {
      const Vec<T> inv = load(plan.inverse + plan.inverse_row(y) + size_t(j) * n);
      for (int c = 0; c < C; ++c) {
        T* const at = row + size_t((j + plan.halo) * C + c) * n;
        store(at, inverse ? load(at) * inv : load(at) / inv);
      }
    }
    fill_halo<T, C>(plan, row);
  }
}

template <class T>
void scale_by_degree(const WalkPlan<T>& plan, T* state, int count, bool inverse, int begin, int end) {
  switch (count) {
    case 1: return scale_rows<T, 1>(plan, state, inverse, begin, end);
    case 2: return scale_rows<T, 2>(plan, state, inverse, begin, end);
    case 3: return scale_rows<T, 3>(plan, state, inverse, begin, end);
    case 4: return scale_rows<T, 4>(plan, state, inverse, begin, end);
    case 5: return scale_rows<T, 5>(plan, state, inverse, begin, end);
  }
}

template <class T, int C>
void outer(const WalkPlan<T>& plan, const T* b, const T* x, const T* q, T scale, int begin, int end) {
  constexpr int n = kLanes<T>;
  const ptrdiff_t stride = ptrdiff_t(plan.blocks + 2 * plan.halo) * C * n;
  for (int y = begin; y < end; ++y) {
    for (int j = 0; j < plan.blocks; ++j) {
      const ptrdiff_t at = ptrdiff_t(plan.state_row(y, C)) + ptrdiff_t(j + plan.halo) * C * n;
      Vec<T> bi[C], xi[C], qi[C];
      for (int c = 0; c < C; ++c) {
        bi[c] = scale * load(b + at + c * n);
        xi[c] = load(x + at + c * n);
        qi[c] = load(q + at + c * n);
      }
      T* const out = plan.gradient + plan.weight_row(y) + plan.position[j + plan.halo];
      for (int dy = 0, k = 0; dy < plan.radius; ++dy) {
        const int reach = stencil_reach(plan.radius, dy);
        for (int dx = dy == 0 ? 1 : -reach; dx <= reach; ++dx, ++k) {
          const ptrdiff_t there = at + dy * stride + ptrdiff_t(dx) * C * n;
          Vec<T> sum = load(out + plan.slot[k] * n);
          for (int c = 0; c < C; ++c) {
            sum += bi[c] * (load(x + there + c * n) - qi[c]);
            sum += scale * load(b + there + c * n) * (xi[c] - load(q + there + c * n));
          }
          store(out + plan.slot[k] * n, sum);
        }
      }
    }
  }
}

template <class T>
void unpack_gradient(const WalkPlan<T>& plan, const float* affinity, double beta, float* grad, T* scratch, int begin,
                     int end) {
  const size_t plane = size_t(plan.height) * plan.width;
  T* const line = scratch + walk_scratch_size(plan);
  for (int y = begin; y < end; ++y) {
    const T* const gradient = plan.gradient + plan.weight_row(y);
    for (int dy = 0, k = 0; dy < plan.radius; ++dy) {
      const int reach = stencil_reach(plan.radius, dy);
      for (int dx = dy == 0 ? 1 : -reach; dx <= reach; ++dx, ++k) {
        const size_t at = k * plane + size_t(y) * plan.width;
        unstripe(plan, line, [&](int t) __attribute__((always_inline)) {
          return load(gradient + plan.position[t + plan.halo] + plan.slot[k] * kLanes<T>);
        });
        T* const slope = row_in_scratch(plan, scratch, affinity + at);
        clear_outside(plan, slope, y, dy, dx);  // whatever stands there, it has no gradient
        power(slope, padded_width(plan), beta - 1);
        for (int x = 0; x < plan.width; ++x) grad[at + x] = float(line[x] * T(beta) * slope[x]);
      }
    }
  }
}

template <class T>
constexpr WalkKernels<T> make_kernels() {
  return {kLanes<T>,          pack_weights<T>,
          invert_degrees<T>,  pack_maps<T>,
          unpack_maps<T>,     {nullptr, step<T, 1>, step<T, 2>, step<T, 3>, step<T, 4>, step<T, 5>},
          scale_by_degree<T>, {nullptr, outer<T, 1>, outer<T, 2>, outer<T, 3>, outer<T, 4>, outer<T, 5>},
          unpack_gradient<T>};
}

extern const WalkKernels<float> walk_kernels_float;
extern const WalkKernels<double> walk_kernels_double;
constexpr WalkKernels<float> walk_kernels_float = make_kernels<float>();
constexpr WalkKernels<double> walk_kernels_double = make_kernels<double>();

}  // namespace WSSS_ISA
}  // namespace wsss
