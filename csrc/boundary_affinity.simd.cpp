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

// v where columns x, x + 1, ... are in [0, width), else 0.
WSSS_ALWAYS_INLINE V inside(V v, int x, int width) {
  typedef uint32_t VecUnsigned __attribute__((vector_size(WSSS_VECTOR_BYTES)));
  return (VecUnsigned)(column() + x) < uint32_t(width) ? v : V{};
}

// Which lanes, in as little memory as the instruction set allows.
#if defined(__AVX512F__)
typedef __mmask16 Lanes;
WSSS_ALWAYS_INLINE Lanes at_least(VecInt a, VecInt b) { return _mm512_cmpge_epi32_mask((__m512i)a, (__m512i)b); }
WSSS_ALWAYS_INLINE V add_where(V sum, V v, Lanes lanes) {
  return (V)_mm512_mask_add_ps((__m512)sum, lanes, (__m512)sum, (__m512)v);
}
WSSS_ALWAYS_INLINE V zero_where(V v, Lanes lanes) {
  return (V)_mm512_mask_mov_ps((__m512)v, lanes, _mm512_setzero_ps());
}
#else
typedef VecInt Lanes;
WSSS_ALWAYS_INLINE Lanes at_least(VecInt a, VecInt b) { return a >= b; }
WSSS_ALWAYS_INLINE V add_where(V sum, V v, Lanes lanes) { return sum + (V)((VecInt)v & lanes); }
WSSS_ALWAYS_INLINE V zero_where(V v, Lanes lanes) { return (V)((VecInt)v & ~lanes); }
#endif

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

// Up to G vectors of the pairs [K, H, W] that begin at pixel (y, x), the out it points to, from keys of that pixel.
template <int G>
WSSS_ALWAYS_INLINE void forward_group(const BoundaryProblem& problem, int x, int links, const int32_t* keys,
                                      float* out) {
  const PathTree& tree = *problem.tree;
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
        const int there = x + step->dx, width = step->link < links ? problem.width : 0;
        float* const pair = out + step->link * problem.plane;
        unroll<0, G>([&](auto g) __attribute__((always_inline)) {
          const V value = inside(1.0f - from_key(m[g]), there + g * n, width);
          if (problem.stream) {
            stream(pair + g * n, value);
          } else if (g < G - 1) {
            store(pair + g * n, value);
          } else {
            store_some(pair + g * n, value, problem.width - x - g * n);
          }
        });
      }
    }
  }
}

// Gradients of the pairs of forward_group to the points they belong to. They lie in as many planes as there are pairs,
// where no processor sees by itself what is read next.
template <int G>
WSSS_ALWAYS_INLINE void backward_group(const BoundaryProblem& problem, int x, int links, const int32_t* keys,
                                       const float* grad, float* points) {
  const PathTree& tree = *problem.tree;
  VecInt at_fork[kMaxPathDepth][G], m[G];
  Lanes here[kMaxPathDepth][G];          // where a step's point is its maximum
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
        here[step->depth][g] = at_least(key, m[g]);
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
        const int there = x + step->dx, width = step->link < links ? problem.width : 0;
        const float* const pair = grad + step->link * problem.plane;
        const float* const soon = grad + step->soon * problem.plane;
        unroll<0, G>([&](auto g) __attribute__((always_inline)) {
          __builtin_prefetch(soon + g * n);
          __builtin_prefetch(pair + (G + g) * n, 0, 2);  // the next group's
          const V v = g < G - 1 ? load(pair + g * n) : load_some(pair + g * n, problem.width - x - g * n);
          flow[g] += inside(v, there + g * n, width);
        });
      }
      float* const point = points + step->point * ptrdiff_t(kPointLine);
      unroll<0, G>([&](auto g) __attribute__((always_inline)) {
        store(point + g * n, add_where(load(point + g * n), flow[g], here[depth][g]));
        flow[g] = zero_where(flow[g], here[depth][g]);
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

// How many neighbours, which come row by row, are in rows a pixel of row y has below it.
WSSS_ALWAYS_INLINE int links_inside(const BoundaryProblem& problem, int y) {
  int count = problem.hood->count;
  while (count > 0 && y + problem.hood->dy[count - 1] >= problem.height) --count;
  return count;
}

void forward(const BoundaryProblem& problem, const int32_t* keys, int y, int y_end, float* out) {
  for (; y < y_end; ++y, keys += boundary_line(problem.width)) {
    const int links = links_inside(problem, y);
    float* const row = out + size_t(y) * problem.width;
    for_groups(problem.width, [&](auto groups, int x) __attribute__((always_inline)) {
      forward_group<decltype(groups)::value>(problem, x, links, keys + kBoundaryMargin + x, row + x);
    });
  }
  finish_streaming();
}

void backward(const BoundaryProblem& problem, const int32_t* keys, int y, int y_end, const float* grad, float* points,
              float* sums) {
  const PathTree& tree = *problem.tree;
  const ptrdiff_t line = boundary_line(problem.width);
  for (; y < y_end; ++y, keys += line, sums += line) {
    const int links = links_inside(problem, y);
    for (int begin = 0; begin < problem.width; begin += kPointColumns) {
      const int columns = problem.width - begin < kPointColumns ? problem.width - begin : kPointColumns;
      for_groups(columns, [&](auto groups, int column) __attribute__((always_inline)) {
        const int x = begin + column;
        backward_group<decltype(groups)::value>(problem, x, links, keys + kBoundaryMargin + x,
                                                grad + size_t(y) * problem.width + x, points + kPointMargin + column);
      });
      const int reach = (columns + 15) / 16 * 16 + kBoundaryMargin;
      for (int first = 0, last = 0; first < tree.point_count; first = last) {
        while (last < tree.point_count && tree.points[last].dy == tree.points[first].dy) ++last;
        float* const row = sums + tree.points[first].dy * line + kBoundaryMargin + begin;
        for (int x = -kBoundaryMargin; x < reach; x += n) {
          V sum = load(row + x);
          for (int i = first; i < last; ++i) {
            sum += load(points + i * kPointLine + kPointMargin + x - tree.points[i].dx);
          }
          store(row + x, sum);
        }
      }
      const V zero = in_register<float>(V{});  // or the loop becomes a call for every few vectors
      for (int i = 0; i < tree.point_count; ++i) {
        for (int x = 0; x < columns; x += n) store(points + i * kPointLine + kPointMargin + x, zero);
      }
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
constexpr BoundaryKernels boundary_kernels = {pack, forward, backward, subtract_rows};

}  // namespace WSSS_ISA
}  // namespace wsss
