#include "boundary_affinity_kernels.h"
#include "common/simd_math.h"

namespace wsss {
namespace WSSS_ISA {

constexpr int n = kLanes<float>;
constexpr int kGroup = 4;  // vectors of pixels that take a step together
using V = Vec<float>;

WSSS_ALWAYS_INLINE VecInt to_key(V v) {
  const VecInt bits = (VecInt)v;
  const VecInt key = bits < 0 ? splat(INT32_MIN) - bits : bits;
  return v != v ? splat(INT32_MAX) : key;
}
WSSS_ALWAYS_INLINE V from_key(VecInt key) { return (V)(key < 0 ? splat(INT32_MIN) - key : key); }

WSSS_ALWAYS_INLINE VecInt column() {
  int32_t lanes[n];
  for (int i = 0; i < n; ++i) lanes[i] = i;
  return load(lanes);
}

// v where the neighbour dx away from columns x, x + 1, ... is inside, else 0.
WSSS_ALWAYS_INLINE V inside(V v, int x, int dx, int width) {
  if (x + dx >= 0 && x + n + dx <= width) return v;
  const VecInt there = column() + (x + dx);
  return (there >= 0) & (there < width) ? v : V{};
}

void pack(const BoundaryProblem& problem, const float* boundary, int32_t* keys, int y, int y_end) {
  const int width = problem.width;
  const ptrdiff_t line = boundary_line(width);
  for (; y < y_end + problem.radius - 1; ++y, keys += line) {
    std::memset(keys, 0, line * sizeof(int32_t));
    if (y >= problem.height) continue;
    const float* const row = boundary + size_t(y) * width;
    for (int x = 0; x < width; x += n) store(keys + kBoundaryMargin + x, to_key(load_some(row + x, width - x)));
  }
}

template <int G>
WSSS_ALWAYS_INLINE void forward_group(const BoundaryProblem& problem, const int32_t* keys, float* out, int y, int x) {
  const size_t plane = size_t(problem.height) * problem.width;
  VecInt at_fork[kMaxPathDepth][G], m[G];
  unroll<0, G>([&](auto g) __attribute__((always_inline)) { at_fork[0][g] = load(keys + g * n); });
  const PathTree& tree = *problem.tree;
  for (int b = 0; b < tree.branch_count; ++b) {
    const PathBranch& branch = tree.branches[b];
    const PathStep* step = tree.down + branch.down;
    const PathStep* const end = tree.down + branch.down_end;
    unroll<0, G>([&](auto g) __attribute__((always_inline)) { m[g] = at_fork[step->depth - 1][g]; });
    for (; step < end; ++step) {
      unroll<0, G>([&](auto g) __attribute__((always_inline)) {
        const VecInt key = load(keys + step->at + g * n);
        m[g] = key > m[g] ? key : m[g];
      });
      if (step->forks) {
        unroll<0, G>([&](auto g) __attribute__((always_inline)) { at_fork[step->depth][g] = m[g]; });
      }
      if (step->link < 0) continue;
      const int k = step->link, dx = problem.hood->dx[k];
      const bool row_inside = y + problem.hood->dy[k] < problem.height;
      float* const to = out + k * plane;
      unroll<0, G>([&](auto g) __attribute__((always_inline)) {
        const int at = x + g * n;
        const V value = row_inside ? inside(1.0f - from_key(m[g]), at, dx, problem.width) : V{};
        store_some(to + g * n, value, problem.width - at);
      });
    }
  }
}

template <int G>
WSSS_ALWAYS_INLINE void backward_group(const BoundaryProblem& problem, const int32_t* keys, const float* grad,
                                       float* points, int y, int x) {
  const size_t plane = size_t(problem.height) * problem.width;
  VecInt largest[kMaxPathDepth][G];
  V waiting[kMaxPathDepth][G], flow[G];  // gradients of maxima: those that wait at a fork, those on their way up
  const auto add_link = [&](int k) __attribute__((always_inline)) {
    if (y + problem.hood->dy[k] >= problem.height) return;
    const float* const from = grad + k * plane;
    unroll<0, G>([&](auto g) __attribute__((always_inline)) {
      const int at = x + g * n;
      flow[g] += inside(load_some(from + g * n, problem.width - at), at, problem.hood->dx[k], problem.width);
    });
  };
  unroll<0, G>([&](auto g) __attribute__((always_inline)) { largest[0][g] = load(keys + g * n); });
  const PathTree& tree = *problem.tree;
  for (int b = 0; b < tree.branch_count; ++b) {
    const PathBranch& branch = tree.branches[b];
    const PathStep* step = tree.down + branch.down;
    const PathStep* end = tree.down + branch.down_end;
    VecInt m[G];
    unroll<0, G>([&](auto g) __attribute__((always_inline)) { m[g] = largest[step->depth - 1][g]; });
    for (; step < end; ++step) {
      unroll<0, G>([&](auto g) __attribute__((always_inline)) {
        const VecInt key = load(keys + step->at + g * n);
        m[g] = key > m[g] ? key : m[g];
        largest[step->depth][g] = m[g];
      });
    }
    step = tree.up + branch.up;
    end = tree.up + branch.up_end;
    unroll<0, G>([&](auto g) __attribute__((always_inline)) { flow[g] = V{}; });
    for (; step < end; ++step) {
      const int depth = step->depth;
      if (step->forks) unroll<0, G>([&](auto g) __attribute__((always_inline)) { flow[g] += waiting[depth][g]; });
      if (step->link >= 0) add_link(step->link);
      float* const point = points + step->point * ptrdiff_t(kPointLine);
      unroll<0, G>([&](auto g) __attribute__((always_inline)) {
        const VecInt here = load(keys + step->at + g * n) >= largest[depth - 1][g];
        store(point + g * n, load(point + g * n) + (here ? flow[g] : V{}));
        flow[g] = here ? V{} : flow[g];
      });
    }
    const int stop = branch.stop;
    unroll<0, G>([&](auto g) __attribute__((always_inline)) {
      waiting[stop][g] = branch.first ? flow[g] : waiting[stop][g] + flow[g];
    });
  }
  float* const own = points + tree.pixel * ptrdiff_t(kPointLine);  // every path's last point takes what is left
  unroll<0, G>([&](auto g) __attribute__((always_inline)) { store(own + g * n, waiting[0][g]); });
}

// body(Index<G>, x) for groups of up to kGroup vectors that begin in columns [x, end).
template <class Body>
WSSS_ALWAYS_INLINE void for_groups(int x, int end, Body&& body) {
  for (; x < end; x += kGroup * n) {
    const int left = end - x;
    if (left > 3 * n) {
      body(Index<4>{}, x);
    } else if (left > 2 * n) {
      body(Index<3>{}, x);
    } else if (left > n) {
      body(Index<2>{}, x);
    } else {
      body(Index<1>{}, x);
    }
  }
}

void forward_row(const BoundaryProblem& problem, const int32_t* keys, float* out, int y) {
  out += size_t(y) * problem.width;
  for_groups(0, problem.width, [&](auto groups, int x) __attribute__((always_inline)) {
    forward_group<decltype(groups)::value>(problem, keys + kBoundaryMargin + x, out + x, y, x);
  });
}

void backward_row(const BoundaryProblem& problem, const int32_t* keys, const float* grad, float* points, float* sums,
                  int y) {
  grad += size_t(y) * problem.width;
  const PathTree& tree = *problem.tree;
  const int count = tree.point_count;
  const ptrdiff_t line = boundary_line(problem.width);
  for (int left = 0; left < problem.width; left += kPointColumns) {
    const int right = problem.width - left < kPointColumns ? problem.width : left + kPointColumns;
    for_groups(left, right, [&](auto groups, int x) __attribute__((always_inline)) {
      backward_group<decltype(groups)::value>(problem, keys + kBoundaryMargin + x, grad + x,
                                              points + kPointMargin + x - left, y, x);
    });
    const int reach = (right - left + 15) / 16 * 16 + kBoundaryMargin;
    for (int first = 0, last = 0; first < count; first = last) {
      while (last < count && tree.points[last].dy == tree.points[first].dy) ++last;
      float* const row = sums + tree.points[first].dy * line + kBoundaryMargin + left;
      for (int x = -kBoundaryMargin; x < reach; x += n) {
        V sum = load(row + x);
        for (int i = first; i < last; ++i) sum += load(points + i * kPointLine + kPointMargin + x - tree.points[i].dx);
        store(row + x, sum);
      }
    }
    for (int i = 0; i < count; ++i) std::memset(points + i * kPointLine + kPointMargin, 0, kPointColumns * 4);
  }
}

void subtract_rows(float* to, const float* const* rows, int count, int width) {
  for (int x = 0; x < width; x += n) {
    V sum{};
    for (int i = 0; i < count; ++i) sum -= load(rows[i] + x);
    store_some(to + x, sum, width - x);
  }
}

extern const BoundaryKernels boundary_kernels;
constexpr BoundaryKernels boundary_kernels = {pack, forward_row, backward_row, subtract_rows};

}  // namespace WSSS_ISA
}  // namespace wsss
