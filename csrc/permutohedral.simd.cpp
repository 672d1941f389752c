// Inner loops of the permutohedral lattice and of the mean field on it, compiled once per instruction set.
#include "common/simd.h"
#include "common/simd_math.h"
#include "permutohedral_kernels.h"

extern "C" double sqrt(double);

namespace wsss {
namespace WSSS_ISA {

namespace {

constexpr int n = kLanes<float>;
using V = Vec<float>;

// Keeps the compiler from fusing what comes next with this product: which simplex a pixel falls into is decided by
// rounding, and must be the same everywhere.
WSSS_ALWAYS_INLINE V rounded(V v) {
#if defined(__aarch64__)
  asm("" : "+w"(v));
  return v;
#else
  return in_register<float>(v);
#endif
}

WSSS_ALWAYS_INLINE V whole(V v) { return (v + 12582912.0f) - 12582912.0f; }  // half to even, |v| < 2^22

WSSS_ALWAYS_INLINE VecInt to_int(V v) { return __builtin_convertvector(v, VecInt); }

// n pixels of one row; feature[d] of each. Order of operations and roundings as in reference/permutohedral.py.
template <int D>
WSSS_ALWAYS_INLINE void find_simplices(const V* feature, const float* scale, int x, SimplexRow& out) {
  V elevated[D + 1], base[D + 1], offset[D + 1], rank[D + 1], total{}, surplus{};
  unroll<0, D>([&](auto k) __attribute__((always_inline)) {
    constexpr int j = D - k.value;
    const V c = rounded(feature[j - 1] * scale[j - 1]);
    elevated[j] = total - rounded(c * float(j));
    total += c;
  });
  elevated[0] = total;
  unroll<0, D + 1>([&](auto i) __attribute__((always_inline)) {
    const V multiple = whole(rounded(elevated[i] * float(1.0 / (D + 1))));
    base[i] = multiple;
    offset[i] = elevated[i] - multiple * float(D + 1);
    surplus += multiple;
    rank[i] = V{};
  });
  unroll<0, D>([&](auto i) __attribute__((always_inline)) {
    unroll<i.value + 1, D + 1>([&](auto j) __attribute__((always_inline)) {
      const auto less = offset[i] < offset[j];
      rank[i] += less ? splat(1.0f) : V{};
      rank[j] += less ? V{} : splat(1.0f);
    });
  });
  V sorted[D + 1];
  unroll<0, D + 1>([&](auto i) __attribute__((always_inline)) { sorted[i] = V{}; });
  unroll<0, D + 1>([&](auto i) __attribute__((always_inline)) {
    rank[i] += surplus;
    const V wrap = rank[i] < 0.0f ? splat(1.0f) : rank[i] > float(D) ? splat(-1.0f) : V{};
    rank[i] += wrap * float(D + 1);
    base[i] += wrap;
    const V step = rounded((elevated[i] - base[i] * float(D + 1)) * float(1.0 / (D + 1)));
    unroll<0, D + 1>(
        [&](auto p) __attribute__((always_inline)) { sorted[p] = rank[i] == float(D - p.value) ? step : sorted[p]; });
    store((int32_t*)out.q[i] + x, to_int(base[i]));
    store((int32_t*)out.rank[i] + x, to_int(rank[i]));
  });
  store(out.weight[0] + x, sorted[0] + (1.0f - sorted[D]));
  unroll<1, D + 1>([&](auto p) __attribute__((always_inline)) { store(out.weight[p] + x, sorted[p] - sorted[p - 1]); });
}

template <int D>
WSSS_ALWAYS_INLINE void simplices_of(const LatticeSpace& space, const LatticeTile& tile, int y, const float* image,
                                     SimplexRow& out) {
  float scale[D], count[n];
  for (int i = 0; i < D; ++i) scale[i] = float(::sqrt(2.0 / 3) * (D + 1) / ::sqrt((i + 1.0) * (i + 2.0)));
  for (int i = 0; i < n; ++i) count[i] = float(i);
  const size_t plane = size_t(space.height) * space.width;
  for (int x = tile.x_begin; x < tile.x_end; x += n) {
    V feature[D];
    feature[0] = (load(count) + float(x)) / space.sigma[0];
    feature[1] = splat(float(y)) / space.sigma[1];
    if constexpr (D > 2) {
      unroll<2, D>([&](auto i) __attribute__((always_inline)) {
        const V colour = load_some(image + (i - 2) * plane + size_t(y) * space.width + x, tile.x_end - x);
        const V positive = colour > 0.0f ? colour : V{};  // NaN too
        feature[i] = (positive > 255.0f ? splat(255.0f) : positive) / space.sigma[i];
      });
    }
    find_simplices<D>(feature, scale, x - tile.x_begin, out);
  }
}

void simplices(const LatticeSpace& space, const LatticeTile& tile, int y, const float* image, SimplexRow& out) {
  if (space.dim == 2) {
    simplices_of<2>(space, tile, y, image, out);
  } else {
    simplices_of<5>(space, tile, y, image, out);
  }
}

// Rows of values. Up to n labels: one vector of 4, 8 or 16 lanes, whatever fits; beyond, vectors of n lanes, or three
// of 8 lanes.
int row_floats(int64_t labels) {
  if (labels > 16 && labels <= 24 && n >= 8) return 24;
  if (labels > n) return int((labels + n - 1) / n * n);
  int width = 4;
  while (width < labels) width *= 2;
  return width;
}

template <int W>
struct Lanes {
  typedef float Type __attribute__((vector_size(4 * W)));
};

// A row's form: Count vectors of W lanes; Count 0: row / W, known at run time.
template <int W, int Count>
struct Row {
  using Vector = typename Lanes<W>::Type;
  static constexpr int lanes = W, known_count = Count;
  int row;
  int count() const { return Count ? Count : row / W; }
};

template <class R>
WSSS_ALWAYS_INLINE typename R::Vector load_row(const float* p) {
  typename R::Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class R>
WSSS_ALWAYS_INLINE void store_row(float* p, typename R::Vector v) {
  std::memcpy(p, &v, sizeof v);
}

template <class Body>
WSSS_ALWAYS_INLINE void with_row(int row, Body&& body) {
  if (row == 4) return body(Row<4, 1>{row});
  if constexpr (n >= 8) {
    if (row == 8) return body(Row<8, 1>{row});
    if (row == 24) return body(Row<8, 3>{row});
  }
  if constexpr (n >= 16) {
    if (row == 16) return body(Row<16, 1>{row});
  }
  if (row == 2 * n) return body(Row<n, 2>{row});
  body(Row<n, 0>{row});
}

// What a pass needs of a lattice for the pixels from `first` on.
struct Links {
  const float* weights;
  const uint16_t* local;
  const uint32_t* points;  // of the tile's rows
  const float* values;
  float* rows;  // of the tile
};
WSSS_ALWAYS_INLINE Links links_of(const LatticeTerm& term, const LatticeTile& tile, int64_t index, int64_t pixel,
                                  int row) {
  const LatticeView& lattice = *term.lattice;
  const size_t at = size_t(tile.first + pixel) * lattice.vertices, first_row = lattice.tile_row[index];
  return {lattice.weights + at, lattice.local + at, lattice.points + first_row, term.values,
          term.rows ? term.rows + first_row * row : nullptr};
}

// sums += weights * values of one pixel's vertices; Count vectors of the rows.
template <int Vertices, class R, int Count>
WSSS_ALWAYS_INLINE void slice_pixel(const Links& links, int pixel, int row, int from, typename R::Vector* sums) {
  unroll<0, Vertices>([&](auto k) __attribute__((always_inline)) {
    const int i = pixel * Vertices + k;
    const float* const value = links.values + size_t(links.points[links.local[i]]) * size_t(row) + from;
    unroll<0, Count>([&](auto c) __attribute__((always_inline)) {
      sums[c] += links.weights[i] * load_row<R>(value + c * R::lanes);
    });
  });
}

// The vertices' rows += weights * value.
template <int Vertices, class R, int Count>
WSSS_ALWAYS_INLINE void splat_pixel(const Links& links, int pixel, int row, int from, const typename R::Vector* value) {
  unroll<0, Vertices>([&](auto k) __attribute__((always_inline)) {
    const int i = pixel * Vertices + k;
    float* const to = links.rows + size_t(links.local[i]) * size_t(row) + from;
    unroll<0, Count>([&](auto c) __attribute__((always_inline)) {
      store_row<R>(to + c * R::lanes, load_row<R>(to + c * R::lanes) + links.weights[i] * value[c]);
    });
  });
}

// body(first vector, number of them as a constant) over the vectors of a row.
template <class R, class Body>
WSSS_ALWAYS_INLINE void over_row(R form, Body&& body) {
  if constexpr (R::known_count > 0) {
    body(0, Index<R::known_count>{});
  } else {
    int c = 0;
    for (; c + 4 <= form.count(); c += 4) body(c, Index<4>{});
    for (; c < form.count(); ++c) body(c, Index<1>{});
  }
}

// out = in + slices of up to two lattices (a null one's are none).
template <int First, int Second, class R>
WSSS_ALWAYS_INLINE void add_slices(const Links* links, const float* in, float* out, int pixels, R form) {
  for (int i = 0; i < pixels; ++i, in += form.row, out += form.row) {
    over_row(form, [&](int begin, auto count) __attribute__((always_inline)) {
      typename R::Vector sums[count.value];
      for (int c = 0; c < count; ++c) sums[c] = load_row<R>(in + (begin + c) * R::lanes);
      slice_pixel<First, R, count.value>(links[0], i, form.row, begin * R::lanes, sums);
      if constexpr (Second > 0) slice_pixel<Second, R, count.value>(links[1], i, form.row, begin * R::lanes, sums);
      for (int c = 0; c < count; ++c) store_row<R>(out + (begin + c) * R::lanes, sums[c]);
    });
  }
}

template <int First, int Second, class R>
WSSS_ALWAYS_INLINE void splat_pixels(const Links* links, const float* in, const float* scale, int pixels, R form) {
  for (int i = 0; i < pixels; ++i, in += form.row) {
    over_row(form, [&](int begin, auto count) __attribute__((always_inline)) {
      typename R::Vector value[count.value];
      for (int c = 0; c < count; ++c) {
        value[c] = load_row<R>(in + (begin + c) * R::lanes);
        if (scale) value[c] *= scale[i];
      }
      splat_pixel<First, R, count.value>(links[0], i, form.row, begin * R::lanes, value);
      if constexpr (Second > 0) splat_pixel<Second, R, count.value>(links[1], i, form.row, begin * R::lanes, value);
    });
  }
}

// body(vertices of the first lattice, of the second or 0), as constants. Of two the first is the Gaussian's.
template <class Body>
WSSS_ALWAYS_INLINE void with_vertices(const LatticeTerm* terms, int count, Body&& body) {
  if (count == 2) {
    body(Index<3>{}, Index<6>{});
  } else if (terms[0].lattice->vertices == 3) {
    body(Index<3>{}, Index<0>{});
  } else {
    body(Index<6>{}, Index<0>{});
  }
}

template <class Vector, int Distance, int... I>
WSSS_ALWAYS_INLINE Vector swap_lanes(Vector v, Indices<I...>) {
  return __builtin_shufflevector(v, v, (I ^ Distance)...);
}

// In every lane the largest, or the sum, of its group of Group lanes.
template <int Group, class Vector>
WSSS_ALWAYS_INLINE Vector group_maximum(Vector v) {
  unroll<0, 4>([&](auto i) __attribute__((always_inline)) {
    constexpr int distance = 1 << i.value;
    if constexpr (distance < Group) {
      const Vector other = swap_lanes<Vector, distance>(v, typename MakeIndices<sizeof(Vector) / 4>::type{});
      v = v > other ? v : other;
    }
  });
  return v;
}
template <int Group, class Vector>
WSSS_ALWAYS_INLINE Vector group_sum(Vector v) {
  unroll<0, 4>([&](auto i) __attribute__((always_inline)) {
    constexpr int distance = 1 << i.value;
    if constexpr (distance < Group) {
      v += swap_lanes<Vector, distance>(v, typename MakeIndices<sizeof(Vector) / 4>::type{});
    }
  });
  return v;
}

// rows -> exp(row - its maximum); scale = 1 / sum. NaN where a softmax is: of a NaN, a +infinity, -infinity alone.
// Pass by pass over all pixels: within one pixel each step waits for the last.
template <class R>
WSSS_ALWAYS_INLINE void softmax(float* rows, float* scale, int pixels, R form) {
  using Vector = typename R::Vector;
  const int size = pixels * form.row;
  if constexpr (R::known_count == 1) {  // several pixels a vector, or one
    for (int i = 0; i < size; i += n) {
      const V e = load(rows + i);
      const V p = exp(e - group_maximum<R::lanes>(e));
      store(rows + i, p);
      const V total = group_sum<R::lanes>(p);
      for (int k = 0; k < n / R::lanes; ++k) scale[i / R::lanes + k] = total[k * R::lanes];
    }
  } else {
    float* row = rows;
    for (int i = 0; i < pixels; ++i, row += form.row) {
      Vector largest = load_row<R>(row);
      for (int c = 1; c < form.count(); ++c) {
        const Vector e = load_row<R>(row + c * R::lanes);
        largest = largest > e ? largest : e;
      }
      largest = group_maximum<R::lanes>(largest);
      for (int c = 0; c < form.count(); ++c) {
        store_row<R>(row + c * R::lanes, load_row<R>(row + c * R::lanes) - largest);
      }
    }
    for (int i = 0; i < size; i += n) store(rows + i, exp(load(rows + i)));
    row = rows;
    for (int i = 0; i < pixels; ++i, row += form.row) {
      Vector sum = load_row<R>(row);
      for (int c = 1; c < form.count(); ++c) sum += load_row<R>(row + c * R::lanes);
      scale[i] = group_sum<R::lanes>(sum)[0];
    }
  }
  for (int i = 0; i < pixels; i += n) store(scale + i, 1.0f / load(scale + i));
}

void clear_rows(const LatticeTerm& term, int64_t index, int row) {
  const size_t begin = term.lattice->tile_row[index], end = term.lattice->tile_row[index + 1];
  std::memset(term.rows + begin * row, 0, (end - begin) * row * sizeof(float));
}

template <class R>
WSSS_ALWAYS_INLINE void mean_field_of(const MeanFieldPass& pass, const LatticeTile& tile, int64_t index, float* scratch,
                                      R form) {
  const int64_t pixels = tile_pixels(tile);
  float* const scale = scratch + size_t(kLatticeBatch) * pass.row + n;
  float* energies = pass.energies + size_t(tile.first) * pass.row;
  for (int64_t first = 0; first < pixels; first += kLatticeBatch, energies += size_t(kLatticeBatch) * pass.row) {
    const int count = pixels - first < kLatticeBatch ? int(pixels - first) : kLatticeBatch;
    Links links[2];
    for (int t = 0; t < pass.term_count; ++t) links[t] = links_of(pass.terms[t], tile, index, first, pass.row);
    if (pass.slices) {
      with_vertices(pass.terms, pass.term_count, [&](auto a, auto b) __attribute__((always_inline)) {
        add_slices<a.value, b.value>(links, energies, scratch, count, form);
      });
    } else {
      std::memcpy(scratch, energies, size_t(count) * pass.row * sizeof(float));
    }
    softmax(scratch, scale, count, form);
    if (pass.splats) {
      with_vertices(pass.terms, pass.term_count, [&](auto a, auto b) __attribute__((always_inline)) {
        splat_pixels<a.value, b.value>(links, scratch, scale, count, form);
      });
    } else {
      for (int i = 0; i < count; ++i) {
        for (int c = 0; c < form.count(); ++c) {
          const size_t at = size_t(i) * form.row + c * R::lanes;
          store_row<R>(energies + at, load_row<R>(scratch + at) * scale[i]);
        }
      }
    }
  }
}

void mean_field(const MeanFieldPass& pass, const LatticeTile& tile, int64_t index, float* scratch) {
  for (int t = 0; t < pass.term_count && pass.splats; ++t) clear_rows(pass.terms[t], index, pass.row);
  with_row(pass.row,
           [&](auto form) __attribute__((always_inline)) { mean_field_of(pass, tile, index, scratch, form); });
}

void combine(const LatticeView& lattice, const float* rows, float* values, int row, float scale, uint32_t begin,
             uint32_t end) {
  with_row(row, [&](auto form) __attribute__((always_inline)) {
    using R = decltype(form);
    for (uint32_t p = begin; p < end; ++p) {
      float* const out = values + size_t(p) * size_t(form.row);
      over_row(form, [&](int first, auto count) __attribute__((always_inline)) {
        typename R::Vector sums[count.value] = {};
        for (uint32_t i = lattice.first_of[p]; i < lattice.first_of[p + 1]; ++i) {
          const float* const in = rows + size_t(lattice.row_of[i]) * size_t(form.row) + first * R::lanes;
          for (int c = 0; c < count; ++c) sums[c] += load_row<R>(in + c * R::lanes);
        }
        for (int c = 0; c < count; ++c) store_row<R>(out + (first + c) * R::lanes, sums[c] * scale);
      });
    }
  });
}

// Count vectors of the rows at a time, and a chain's values of the last two points in registers.
constexpr uint32_t kAhead = 8;  // rows asked for before they are needed: no prefetcher guesses their order

template <int Bytes>
WSSS_ALWAYS_INLINE void prefetch(const float* p) {
  for (int i = 0; i < Bytes; i += 64) __builtin_prefetch((const char*)p + i, 1);
}

template <class R, int Count>
WSSS_ALWAYS_INLINE void blur_vectors(const uint32_t* chain, ChainRange range, float* values, int row) {
  using Vector = typename R::Vector;
  Vector before[Count], now[Count];
  bool starts = true;
  for (uint32_t i = range.begin; i < range.end; ++i) {
    float* const at = values + size_t(chain[i] & ~kChainEnd) * size_t(row);
    if (starts) {
      for (int c = 0; c < Count; ++c) {
        before[c] = Vector{};
        now[c] = load_row<R>(at + c * R::lanes);
      }
    }
    if (i + kAhead < range.end) {
      prefetch<int(sizeof(Vector)) * Count>(values + size_t(chain[i + kAhead] & ~kChainEnd) * size_t(row));
    }
    starts = chain[i] & kChainEnd;
    const float* const next = starts ? nullptr : values + size_t(chain[i + 1] & ~kChainEnd) * size_t(row);
    for (int c = 0; c < Count; ++c) {
      const Vector after = next ? load_row<R>(next + c * R::lanes) : Vector{};
      store_row<R>(at + c * R::lanes, now[c] + 0.5f * (before[c] + after));
      before[c] = now[c];
      now[c] = after;
    }
  }
}

void blur(const uint32_t* chain, ChainRange range, float* values, int row) {
  with_row(row, [&](auto form) __attribute__((always_inline)) {
    using R = decltype(form);
    over_row(form, [&](int first, auto count) __attribute__((always_inline)) {
      blur_vectors<R, count.value>(chain, range, values + first * R::lanes, row);
    });
  });
}

void splat_tile(const LatticeTerm& term, const float* pixels, int row, const LatticeTile& tile, int64_t index) {
  clear_rows(term, index, row);
  const Links links = links_of(term, tile, index, 0, row);
  with_row(row, [&](auto form) __attribute__((always_inline)) {
    splat_pixels<6, 0>(&links, pixels + size_t(tile.first) * row, nullptr, int(tile_pixels(tile)), form);
  });
}

double slice_tile(const LatticeTerm& term, float* pixels, int row, const LatticeTile& tile, int64_t index) {
  double total = 0;
  with_row(row, [&](auto form) __attribute__((always_inline)) {
    using R = decltype(form);
    const int count = int(tile_pixels(tile));
    float* out = pixels + size_t(tile.first) * row;
    const Links links = links_of(term, tile, index, 0, row);
    for (int i = 0; i < count; ++i, out += row) {
      typename R::Vector product{};
      over_row(form, [&](int begin, auto vectors) __attribute__((always_inline)) {
        typename R::Vector sums[vectors.value] = {};
        slice_pixel<6, R, vectors.value>(links, i, row, begin * R::lanes, sums);
        for (int c = 0; c < vectors; ++c) {
          float* const at = out + (begin + c) * R::lanes;
          product += sums[c] * load_row<R>(at);
          store_row<R>(at, sums[c]);
        }
      });
      total += double(group_sum<R::lanes>(product)[0]);
    }
  });
  return total;
}

void pack(const float* planes, const float* factor, float scale, float padding, int64_t labels, int64_t height,
          int64_t width, const LatticeTile& tile, float* pixels, int row) {
  const size_t plane = size_t(height) * width;
  float* out = pixels + size_t(tile.first) * row;
  for (int y = tile.y_begin; y < tile.y_end; ++y) {
    for (int x = tile.x_begin; x < tile.x_end; x += n) {
      const int count = tile.x_end - x < n ? tile.x_end - x : n;
      const size_t at = size_t(y) * width + x;
      const V by = factor ? scale * load_some(factor + at, count) : splat(scale);
      for (int64_t c = 0; c < row; c += n) {
        V block[n];
        for (int i = 0; i < n; ++i) {
          block[i] = c + i < labels ? by * load_some(planes + size_t(c + i) * plane + at, count) : splat(padding);
        }
        transpose<float>(block);
        const int kept = row - c < n ? int(row - c) : n;
        for (int i = 0; i < count; ++i) store_some(out + size_t(i) * row + c, block[i], kept);
      }
      out += size_t(count) * row;
    }
  }
}

void unpack(const float* pixels, const float* factor, float scale, int64_t labels, int64_t height, int64_t width,
            const LatticeTile& tile, float* planes, int row) {
  const size_t plane = size_t(height) * width;
  const float* in = pixels + size_t(tile.first) * row;
  for (int y = tile.y_begin; y < tile.y_end; ++y) {
    for (int x = tile.x_begin; x < tile.x_end; x += n) {
      const int count = tile.x_end - x < n ? tile.x_end - x : n;
      const size_t at = size_t(y) * width + x;
      const V by = factor ? scale * load_some(factor + at, count) : splat(scale);
      for (int64_t c = 0; c < labels; c += n) {
        const int kept = row - c < n ? int(row - c) : n;
        V block[n];
        for (int i = 0; i < n; ++i) block[i] = i < count ? load_some(in + size_t(i) * row + c, kept) : V{};
        transpose<float>(block);
        for (int i = 0; i < n && c + i < labels; ++i) {
          store_some(planes + size_t(c + i) * plane + at, by * block[i], count);
        }
      }
      in += size_t(count) * row;
    }
  }
}

}  // namespace

extern const LatticeKernels lattice_kernels;
constexpr LatticeKernels lattice_kernels = {simplices,  row_floats, mean_field, combine, blur,
                                            splat_tile, slice_tile, pack,       unpack};

}  // namespace WSSS_ISA
}  // namespace wsss
