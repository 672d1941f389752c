#include "pixel_adaptive.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "pixel_adaptive_kernels.h"

namespace wsss {

WSSS_FOR_EACH_ISA(extern const AdaptiveKernels adaptive_kernels;)

namespace {

const AdaptiveKernels& kernels() { return WSSS_CHOOSE_ISA(adaptive_kernels); }

// Weighted values a thread should have to add in an iteration: some tens of microseconds.
constexpr double kValuesPerThread = 1e6;
constexpr size_t kRingFloats = 240 * 1024;  // of a tile: what stays in a second-level cache
constexpr int kLeastTile = 64;              // columns
constexpr int kMostMaps = 8;                // of a tile: few, for wide tiles, whose edges are read twice

// Neighbours by dilation and then by row; a step past the whole map leads to its edge, as a step of its size does.
struct Ring {
  std::vector<int> dy, dx;
  int rows, columns;  // the farthest

  Ring(const AdaptiveShape& shape, const AdaptiveOptions& options) : rows(0), columns(0) {
    for (int i = 0; i < options.count; ++i) {
      const int down = int(std::min<int64_t>(options.dilations[i], shape.height - 1));
      const int right = int(std::min<int64_t>(options.dilations[i], shape.width - 1));
      rows = std::max(rows, down), columns = std::max(columns, right);
      for (int y = -1; y <= 1; ++y) {
        for (int x = -1; x <= 1; ++x) {
          if (y != 0 || x != 0) dy.push_back(y * down), dx.push_back(x * right);
        }
      }
    }
  }
  int count() const { return int(dy.size()); }
};

// What PAR adds for the distance alone.
std::vector<float> position_weights(const AdaptiveOptions& options) {
  std::vector<double> distance;
  for (int i = 0; i < options.count; ++i) {
    for (int k = 0; k < 8; ++k) {
      const bool corner = k == 0 || k == 2 || k == 5 || k == 7;
      distance.push_back(options.dilations[i] * (corner ? std::sqrt(2.0) : 1.0));
    }
  }
  double mean = 0, squares = 0, total = 0, largest = -HUGE_VAL;
  for (double d : distance) mean += d / double(distance.size());
  for (double d : distance) squares += (d - mean) * (d - mean);
  const double scale = 1 / (std::sqrt(squares / double(distance.size() - 1)) + 1e-8) / 0.3;
  for (double& d : distance) d = -(d * scale) * (d * scale), largest = std::max(largest, d);
  for (double& d : distance) total += d = std::exp(d - largest);
  std::vector<float> weights;
  for (double d : distance) weights.push_back(float(0.01 * d / total));
  return weights;
}

// Copies columns [first, first + count) of a row, those outside the row being its ends.
void copy_clamped(const float* row, int64_t width, int64_t first, int64_t count, float* to) {
  const int64_t before = std::clamp<int64_t>(-first, 0, count), end = std::clamp<int64_t>(width - first, before, count);
  std::fill_n(to, before, row[0]);
  std::copy(row + first + before, row + first + end, to + before);
  std::fill(to + end, to + count, row[width - 1]);
}

// The weights of one image.
class Weights {
 public:
  Weights(const AdaptiveShape& shape, const AdaptiveOptions& options)
      : ring(shape, options),
        height_(int(shape.height)),
        width_(int(shape.width)),
        lanes(kernels().lanes),
        blocks((width_ + lanes - 1) / lanes),
        line_(size_t(blocks) * lanes + 2 * ring.columns),
        position_(options.par ? position_weights(options) : std::vector<float>()),
        picture_(3 * line_ * height_),
        weights_(size_t(height_) * blocks * ring.count() * lanes),
        factors_(size_t(height_) * blocks * lanes) {}

  void make(const float* image, int threads) {
    parallel(threads, [&](const Team& team) {
      const int64_t rows = 3 * int64_t(height_);
      for (int64_t row = team.begin(rows); row < team.end(rows); ++row) {
        copy_clamped(image + row * width_, width_, -ring.columns, int64_t(line_), picture_.get() + row * line_);
      }
      team.barrier();
      const float* taps[3 * kMaxTaps];
      for (int64_t y = team.begin(height_); y < team.end(height_); ++y) {
        WeightRow row = {};
        for (int c = 0; c < 3; ++c) {
          row.centre[c] = pixel(c, int(y), 0);
          for (int k = 0; k < ring.count(); ++k) {
            taps[c * ring.count() + k] = pixel(c, std::clamp(int(y) + ring.dy[k], 0, height_ - 1), ring.dx[k]);
          }
        }
        row.taps = taps;
        row.position = position_.empty() ? nullptr : position_.data();
        row.neighbours = ring.count(), row.blocks = blocks;
        row.weights = of_row(int(y)), row.factors = factors_of_row(int(y));
        kernels().weigh(row);
      }
    });
  }

  uint16_t* of_row(int y) const { return weights_.get() + size_t(y) * blocks * ring.count() * lanes; }
  float* factors_of_row(int y) const { return factors_.get() + size_t(y) * blocks * lanes; }

  const Ring ring;

 private:
  const float* pixel(int c, int y, int x) const {
    return picture_.get() + (size_t(c) * height_ + y) * line_ + ring.columns + x;
  }
  const int height_, width_;

 public:
  const int lanes, blocks;

 private:
  const size_t line_;
  const std::vector<float> position_;
  const Buffer<float> picture_;
  const Buffer<uint16_t> weights_;
  const Buffer<float> factors_;
};

// How the maps of an image are cut: tiles of columns and groups of maps whose rows in use stay in a cache, bands of
// rows where there are fewer of those than threads. No result depends on it.
struct Cut {
  int groups, tiles, bands;
  int tile_columns;

  Cut(const AdaptiveShape& shape, const Weights& weights, int threads) {
    groups = int((shape.channels + kMostMaps - 1) / kMostMaps);
    const int64_t maps = (shape.channels + groups - 1) / groups, window = 2 * weights.ring.rows + 1;
    const int64_t wanted = int64_t(kRingFloats) / (window * maps) - 2 * weights.ring.columns;
    const int64_t wide = int64_t(weights.blocks) * weights.lanes;
    tiles = int((wide + std::max<int64_t>(wanted, kLeastTile) - 1) / std::max<int64_t>(wanted, kLeastTile));
    tile_columns = ((weights.blocks + tiles - 1) / tiles) * weights.lanes;
    tiles = int((wide + tile_columns - 1) / tile_columns);
    bands = int(std::clamp<int64_t>((2 * threads + groups * tiles - 1) / (groups * tiles), 1,
                                    std::max<int64_t>(shape.height / 32, 1)));
  }
  int units() const { return groups * tiles * bands; }
};

// The rows of a tile that a row's neighbours lie in, of each map, ends repeated.
class RowRing {
 public:
  RowRing(const AdaptiveShape& shape, const Weights& weights, const Cut& cut)
      : window_(2 * weights.ring.rows + 1),
        line_(ptrdiff_t(cut.tile_columns) + 2 * weights.ring.columns),
        maps_((shape.channels + cut.groups - 1) / cut.groups),
        rows_(size_t(window_) * maps_ * line_) {}
  float* row(int64_t y) const { return rows_.get() + y % window_ * maps_ * line_; }
  ptrdiff_t line() const { return line_; }

 private:
  const int64_t window_;
  const ptrdiff_t line_;
  const int64_t maps_;
  Buffer<float> rows_;
};

void smooth_unit(const Weights& weights, const Cut& cut, const AdaptiveShape& shape, const RowRing& rows, int unit,
                 const float* maps, float* out) {
  const int group = unit % cut.groups, tile = unit / cut.groups % cut.tiles, band = unit / cut.groups / cut.tiles;
  const int64_t first = shape.channels * group / cut.groups, last = shape.channels * (group + 1) / cut.groups;
  const int height = int(shape.height), width = int(shape.width);
  const int x = tile * cut.tile_columns, columns = std::min(cut.tile_columns, width - x);
  const int begin = int(int64_t(height) * band / cut.bands), end = int(int64_t(height) * (band + 1) / cut.bands);
  const Ring& ring = weights.ring;
  const ptrdiff_t plane = ptrdiff_t(height) * width;
  const float* taps[kMaxTaps];
  int loaded = std::max(begin - ring.rows, 0);
  for (int y = begin; y < end; ++y) {
    for (; loaded <= std::min(y + ring.rows, height - 1); ++loaded) {
      for (int64_t m = first; m < last; ++m) {
        copy_clamped(maps + m * plane + ptrdiff_t(loaded) * width, width, x - ring.columns, rows.line(),
                     rows.row(loaded) + (m - first) * rows.line());
      }
    }
    for (int k = 0; k < ring.count(); ++k) {
      taps[k] = rows.row(std::clamp(y + ring.dy[k], 0, height - 1)) + ring.columns + ring.dx[k];
    }
    SmoothRow row = {};
    row.weights = weights.of_row(y) + size_t(x) * ring.count();
    row.factors = weights.factors_of_row(y) + x;
    row.taps = taps, row.map_stride = rows.line();
    row.neighbours = ring.count(), row.maps = int(last - first), row.pixels = columns;
    row.blocks = (columns + weights.lanes - 1) / weights.lanes;
    row.out = out + first * plane + ptrdiff_t(y) * width + x, row.out_stride = plane;
    kernels().smooth(row);
  }
}

// All iterations of the transpose for the maps [first, last), in place.
void spread_maps(const Weights& weights, const AdaptiveShape& shape, int64_t iterations, int64_t first, int64_t last,
                 const Buffer<float>& sums, float* grad) {
  const int height = int(shape.height), width = int(shape.width), maps = int(last - first);
  const Ring& ring = weights.ring;
  const ptrdiff_t plane = ptrdiff_t(height) * width;
  const ptrdiff_t line = ptrdiff_t(weights.blocks) * weights.lanes + 2 * ring.columns, sums_plane = line * height;
  float* taps[kMaxTaps];
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
    std::fill_n(sums.get(), maps * sums_plane, 0.0f);
    for (int y = 0; y < height; ++y) {
      for (int k = 0; k < ring.count(); ++k) {
        taps[k] = sums.get() + std::clamp(y + ring.dy[k], 0, height - 1) * line + ring.columns + ring.dx[k];
      }
      SpreadRow row = {};
      row.weights = weights.of_row(y), row.factors = weights.factors_of_row(y);
      row.grad = grad + first * plane + ptrdiff_t(y) * width, row.grad_stride = plane;
      row.taps = taps, row.map_stride = sums_plane;
      row.neighbours = ring.count(), row.blocks = weights.blocks, row.maps = maps, row.pixels = width;
      kernels().spread(row);
    }
    for (int64_t row = 0; row < int64_t(maps) * height; ++row) {
      const float* const from = sums.get() + row * line;
      float* const to = grad + first * plane + row * width;
      std::copy_n(from + ring.columns, width, to);
      for (ptrdiff_t x = 0; x < ring.columns; ++x) to[0] += from[x];
      for (ptrdiff_t x = ring.columns + width; x < line; ++x) to[width - 1] += from[x];
    }
  }
}

double work_of(const AdaptiveShape& shape, const AdaptiveOptions& options) {
  return double(shape.channels) * double(shape.height) * double(shape.width) * 8 * options.count;
}

}  // namespace

void pixel_adaptive_cpu(const float* image, const float* maps, float* out, AdaptiveShape shape,
                        const AdaptiveOptions& options, int threads) {
  const size_t plane = size_t(shape.height) * shape.width, image_maps = size_t(shape.channels) * plane;
  if (shape.batch * image_maps == 0) return;
  expect_writes(out, shape.batch * image_maps * sizeof(float));
  if (options.iterations == 0) {
    std::copy_n(maps, shape.batch * image_maps, out);
    return;
  }
  threads = worthwhile_threads(usable_threads(threads), work_of(shape, options), kValuesPerThread);
  Weights weights(shape, options);
  const Cut cut(shape, weights, threads);
  const Buffer<float> scratch(options.iterations > 1 ? image_maps : 0);
  std::vector<RowRing> rings;
  rings.reserve(threads);
  for (int i = 0; i < threads; ++i) rings.emplace_back(shape, weights, cut);
  for (int64_t b = 0; b < shape.batch; ++b) {
    weights.make(image + b * 3 * plane, threads);
    const float* from = maps + b * image_maps;
    for (int64_t left = options.iterations; left > 0; --left) {
      float* const to = left % 2 ? out + b * image_maps : scratch.get();
      std::atomic<int> next{0};
      parallel(threads, [&](const Team& team) {
        for (int unit = next++; unit < cut.units(); unit = next++) {
          smooth_unit(weights, cut, shape, rings[team.thread], unit, from, to);
        }
      });
      from = to;
    }
  }
}

void pixel_adaptive_backward_cpu(const float* grad, const float* image, float* grad_maps, AdaptiveShape shape,
                                 const AdaptiveOptions& options, int threads) {
  const size_t plane = size_t(shape.height) * shape.width, image_maps = size_t(shape.channels) * plane;
  if (shape.batch * image_maps == 0) return;
  std::copy_n(grad, shape.batch * image_maps, grad_maps);
  if (options.iterations == 0) return;
  threads = worthwhile_threads(usable_threads(threads), work_of(shape, options), kValuesPerThread);
  Weights weights(shape, options);
  // A thread has whole maps, so that every sum has one order.
  const int64_t groups = std::max<int64_t>(std::min<int64_t>(threads, shape.channels), (shape.channels + 7) / 8);
  const int64_t most = (shape.channels + groups - 1) / groups;
  const size_t line = size_t(weights.blocks) * weights.lanes + 2 * weights.ring.columns;
  std::vector<Buffer<float>> sums;
  sums.reserve(threads);
  for (int i = 0; i < threads; ++i) sums.emplace_back(most * line * shape.height);
  for (int64_t b = 0; b < shape.batch; ++b) {
    weights.make(image + b * 3 * plane, threads);
    std::atomic<int64_t> next{0};
    parallel(threads, [&](const Team& team) {
      for (int64_t group = next++; group < groups; group = next++) {
        spread_maps(weights, shape, options.iterations, shape.channels * group / groups,
                    shape.channels * (group + 1) / groups, sums[team.thread], grad_maps + b * image_maps);
      }
    });
  }
}

}  // namespace wsss
