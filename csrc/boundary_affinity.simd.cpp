#include "boundary_affinity_kernels.h"
#include "common/simd_math.h"

namespace wsss {
namespace WSSS_ISA {

constexpr int n = kLanes<float>;
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

// One row's pairs [K][kPathTileGap] from keys of its packed row, whether or not their neighbour is inside.
template <int G>
WSSS_ALWAYS_INLINE void forward_group(const PathTree& tree, const int32_t* keys, float* pairs) {
  VecInt at_fork[kMaxPathDepth][G], m[G];
  unroll<0, G>([&](auto g) __attribute__((always_inline)) { at_fork[0][g] = load(keys + g * n); });
  for (int b = 0; b < tree.branch_count; ++b) {
    const PathStep* step = tree.down + tree.branches[b].down;
    const PathStep* const end = tree.down + tree.branches[b].down_end;
    unroll<0, G>([&](auto g) __attribute__((always_inline)) { m[g] = at_fork[step->depth - 1][g]; });
    for (; step < end; ++step) {
      unroll<0, G>([&](auto g) __attribute__((always_inline)) {
        const VecInt key = load(keys + step->at + g * n);
        m[g] = key > m[g] ? key : m[g];
      });
      if (step->forks) {
        unroll<0, G>([&](auto g) __attribute__((always_inline)) { at_fork[step->depth][g] = m[g]; });
      }
      if (step->link >= 0) {
        float* const pair = pairs + step->link * kPathTileGap;
        unroll<0, G>([&](auto g) __attribute__((always_inline)) { store(pair + g * n, 1.0f - from_key(m[g])); });
      }
    }
  }
}

// Gradients of one row's pairs [K][kPathTileGap], 0 where there is none, to the points they belong to.
template <int G>
WSSS_ALWAYS_INLINE void backward_group(const PathTree& tree, const int32_t* keys, const float* pairs, float* points) {
  VecInt here[kMaxPathDepth][G], at_fork[kMaxPathDepth][G], m[G];  // here: whether a step's point is its maximum
  V waiting[kMaxPathDepth][G], flow[G];  // gradients of maxima: those that wait at a fork, those on their way up
  unroll<0, G>([&](auto g) __attribute__((always_inline)) { at_fork[0][g] = load(keys + g * n); });
  for (int b = 0; b < tree.branch_count; ++b) {
    const PathBranch& branch = tree.branches[b];
    const PathStep* step = tree.down + branch.down;
    const PathStep* end = tree.down + branch.down_end;
    unroll<0, G>([&](auto g) __attribute__((always_inline)) { m[g] = at_fork[step->depth - 1][g]; });
    for (; step < end; ++step) {
      unroll<0, G>([&](auto g) __attribute__((always_inline)) {
        const VecInt key = load(keys + step->at + g * n);
        here[step->depth][g] = key >= m[g];
        m[g] = key > m[g] ? key : m[g];
      });
      if (step->forks) {
        unroll<0, G>([&](auto g) __attribute__((always_inline)) { at_fork[step->depth][g] = m[g]; });
      }
    }
    step = tree.up + branch.up;
    end = tree.up + branch.up_end;
    unroll<0, G>([&](auto g) __attribute__((always_inline)) { flow[g] = V{}; });
    for (; step < end; ++step) {
      const int depth = step->depth;
      if (step->forks) {
        unroll<0, G>([&](auto g) __attribute__((always_inline)) { flow[g] += waiting[depth][g]; });
      }
      if (step->link >= 0) {
        const float* const pair = pairs + step->link * kPathTileGap;
        unroll<0, G>([&](auto g) __attribute__((always_inline)) { flow[g] += load(pair + g * n); });
      }
      float* const point = points + step->point * ptrdiff_t(kPointLine);
      unroll<0, G>([&](auto g) __attribute__((always_inline)) {
        store(point + g * n, load(point + g * n) + (V)((VecInt)flow[g] & here[depth][g]));
        flow[g] = (V)((VecInt)flow[g] & ~here[depth][g]);
      });
    }
    unroll<0, G>([&](auto g) __attribute__((always_inline)) {
      V& stop = waiting[branch.stop][g];
      stop = branch.first ? flow[g] : stop + flow[g];
    });
  }
  float* const own = points + tree.pixel * ptrdiff_t(kPointLine);  // every path's last point takes what is left
  unroll<0, G>([&](auto g) __attribute__((always_inline)) { store(own + g * n, waiting[0][g]); });
}

// body(Index<G>, x) for groups of up to four vectors that begin in columns [0, count).
template <class Body>
WSSS_ALWAYS_INLINE void for_groups(int count, Body&& body) {
  for (int x = 0; x < count; x += 4 * n) {
    const int left = count - x;
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

// body(pairs of the row, where the row begins in the [K, H, W] array, neighbour k, y, inside) for every pair of a tile,
// a neighbour at a time: whole rows of one plane after another, since K planes at once thrash every cache.
template <class Body>
WSSS_ALWAYS_INLINE void for_pairs(const BoundaryProblem& problem, const BoundaryTile& tile, float* pairs, Body&& body) {
  const size_t plane = size_t(problem.height) * problem.width;
  for (int k = 0; k < problem.hood->count; ++k) {
    for (int y = tile.y; y < tile.y_end; ++y) {
      body(pairs + k * kPathTileGap + (y - tile.y) * kPathTileColumns, k * plane + size_t(y) * problem.width + tile.x,
           k, y + problem.hood->dy[k] < problem.height);
    }
  }
}

void forward_tile(const BoundaryProblem& problem, const BoundaryTile& tile, const int32_t* keys, float* out,
                  float* pairs) {
  const int columns = tile.x_end - tile.x;
  for (int y = tile.y; y < tile.y_end; ++y) {
    const int32_t* const row = keys + (y - tile.y) * boundary_line(problem.width) + kBoundaryMargin + tile.x;
    for_groups(columns, [&](auto groups, int x) __attribute__((always_inline)) {
      forward_group<decltype(groups)::value>(*problem.tree, row + x, pairs + (y - tile.y) * kPathTileColumns + x);
    });
  }
  for_pairs(problem, tile, pairs, [&](const float* pair, size_t at, int k, bool exists) __attribute__((always_inline)) {
    for (int x = 0; x < columns; x += n) {
      const V value = exists ? inside(load(pair + x), tile.x + x, problem.hood->dx[k], problem.width) : V{};
      store_some(out + at + x, value, columns - x);
    }
  });
}

void backward_tile(const BoundaryProblem& problem, const BoundaryTile& tile, const int32_t* keys, const float* grad,
                   float* pairs, float* points, float* sums) {
  const PathTree& tree = *problem.tree;
  const ptrdiff_t line = boundary_line(problem.width);
  const int columns = tile.x_end - tile.x;
  for_pairs(problem, tile, pairs, [&](float* pair, size_t at, int k, bool exists) __attribute__((always_inline)) {
    for (int x = 0; x < columns; x += n) {
      const V g = exists ? load_some(grad + at + x, columns - x) : V{};
      store(pair + x, inside(g, tile.x + x, problem.hood->dx[k], problem.width));
    }
  });
  const int reach = (columns + 15) / 16 * 16 + kBoundaryMargin;
  for (int y = tile.y; y < tile.y_end; ++y, keys += line, sums += line) {
    for_groups(columns, [&](auto groups, int x) __attribute__((always_inline)) {
      backward_group<decltype(groups)::value>(tree, keys + kBoundaryMargin + tile.x + x,
                                              pairs + (y - tile.y) * kPathTileColumns + x, points + kPointMargin + x);
    });
    for (int first = 0, last = 0; first < tree.point_count; first = last) {
      while (last < tree.point_count && tree.points[last].dy == tree.points[first].dy) ++last;
      float* const row = sums + tree.points[first].dy * line + kBoundaryMargin + tile.x;
      for (int x = -kBoundaryMargin; x < reach; x += n) {
        V sum = load(row + x);
        for (int i = first; i < last; ++i) sum += load(points + i * kPointLine + kPointMargin + x - tree.points[i].dx);
        store(row + x, sum);
      }
    }
    const V zero = in_register<float>(V{});  // or the loop becomes a call for every few vectors
    for (int i = 0; i < tree.point_count; ++i) {
      for (int x = 0; x < columns; x += n) store(points + i * kPointLine + kPointMargin + x, zero);
    }
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
constexpr BoundaryKernels boundary_kernels = {pack, forward_tile, backward_tile, subtract_rows};

}  // namespace WSSS_ISA
}  // namespace wsss
