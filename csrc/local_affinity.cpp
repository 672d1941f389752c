#include "local_affinity.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "local_affinity_kernels.h"

namespace wsss {

WSSS_FOR_EACH_ISA(extern const AffinityKernels affinity_kernels;)

namespace {

const AffinityKernels& kernels() { return WSSS_CHOOSE_ISA(affinity_kernels); }

// A mean distance 1 - cos up to this is the rounding of the cosines, not a difference between features.
constexpr float kCosineNoise = 1e-6f;
// Pairs of values a thread should have to compare: some tens of microseconds.
constexpr double kPairsPerThread = 5e5;

double pair_work(const FeatureShape& shape, const Neighbourhood& hood) {
  return double(shape.batch) * double(shape.dim) * double(shape.height) * double(shape.width) * hood.count;
}

struct ImageTile {
  int64_t image;
  AffinityTile tile;
};

// Tiles of nearly equal height, in a number the threads can share evenly.
std::vector<ImageTile> tiles_of(int64_t first_image, int64_t images, const FeatureShape& shape, int threads) {
  int64_t bands = (shape.height + kTileRows - 1) / kTileRows;
  if (images % threads != 0) bands = std::min<int64_t>((bands + threads - 1) / threads * threads, shape.height);
  std::vector<ImageTile> tiles;
  for (int64_t b = first_image; b < first_image + images; ++b) {
    for (int64_t i = 0; i < bands; ++i) {
      for (int64_t x = 0; x < shape.width; x += kTileColumns) {
        tiles.push_back({b,
                         {int(shape.height * i / bands), int(shape.height * (i + 1) / bands), int(x),
                          int(std::min<int64_t>(x + kTileColumns, shape.width))}});
      }
    }
  }
  return tiles;
}

AffinityProblem problem_of(const FeatureShape& shape, const AffinityOptions& options, const Neighbourhood& hood) {
  return {int(shape.dim), int(shape.height), int(shape.width), options, &hood};
}

double in_map_pairs(const FeatureShape& shape, const Neighbourhood& hood) {
  double pairs = 0;
  for (int k = 0; k < hood.count; ++k) {
    const int64_t rows = shape.height - hood.dy[k], columns = shape.width - std::abs(hood.dx[k]);
    if (rows > 0 && columns > 0) pairs += double(rows) * double(columns);
  }
  return pairs;
}

}  // namespace

void local_affinity_cpu(const float* feats, float* out, float* scale, FeatureShape shape,
                        const AffinityOptions& options, int threads) {
  const Neighbourhood hood = make_neighbourhood(options.radius);
  const AffinityProblem problem = problem_of(shape, options, hood);
  const size_t plane = size_t(shape.height) * shape.width;
  const size_t image_in = shape.dim * plane, image_out = hood.count * plane;
  for (int64_t b = 0; b < shape.batch; ++b) scale[b] = float(options.scale);
  if (shape.batch == 0 || image_out == 0) return;
  threads = worthwhile_threads(usable_threads(threads), pair_work(shape, hood), kPairsPerThread);
  const std::vector<ImageTile> tiles = tiles_of(0, shape.batch, shape, threads);
  const int64_t rows = shape.batch * shape.height, columns = (shape.width + kTileColumns - 1) / kTileColumns;
  const bool cosine = options.metric == AffinityMetric::kCosine;
  const int64_t widest = std::min<int64_t>((shape.width + 15) / 16 * 16, kTileColumns);
  const size_t sums_size = size_t(hood.count) * kTileRows * widest;
  const Buffer<float> work((kForwardPack + sums_size) * threads), norms(cosine ? shape.batch * plane : 0);
  std::vector<double> row_sums(options.automatic ? rows * columns : 0);
  expect_writes(out, shape.batch * image_out * sizeof(float));
  parallel(threads, [&](const Team& team) {
    float* const packed = work.get() + (kForwardPack + sums_size) * team.thread;
    if (cosine) {
      for (int64_t row = team.begin(rows); row < team.end(rows); ++row) {
        const int64_t b = row / shape.height, y = row % shape.height;
        kernels().inverse_norms(problem, feats + b * image_in, norms.get() + b * plane, int(y), int(y) + 1);
      }
      team.barrier();
    }
    const int64_t last = team.end(int64_t(tiles.size()));
    for (int64_t i = team.begin(int64_t(tiles.size())); i < last; ++i) {
      const auto& [b, tile] = tiles[i];
      double sums[kTileRows];
      kernels().forward_tile(problem, tile, feats + b * image_in, cosine ? norms.get() + b * plane : nullptr,
                             out + b * image_out, sums, packed, packed + kForwardPack);
      if (!options.automatic) continue;
      for (int y = tile.y_begin; y < tile.y_end; ++y) {
        row_sums[(b * shape.height + y) * columns + tile.x_begin / kTileColumns] = sums[y - tile.y_begin];
      }
    }
    if (!options.automatic) return;
    team.barrier();
    if (team.thread == 0) {  // in one order, whatever the number of threads
      const double pairs = in_map_pairs(shape, hood);
      const float least = cosine ? kCosineNoise : 0.0f;
      for (int64_t b = 0; b < shape.batch; ++b) {
        double total = 0;
        for (int64_t i = 0; i < shape.height * columns; ++i) total += row_sums[b * shape.height * columns + i];
        const float mean = pairs > 0 ? float(total / pairs) : 0.0f;
        scale[b] = mean <= least ? 1.0f : mean;
      }
    }
    team.barrier();
    for (int64_t row = team.begin(rows); row < team.end(rows); ++row) {
      const int64_t b = row / shape.height;
      kernels().apply_scale(problem, out + b * image_out, scale[b], int(row % shape.height));
    }
  });
}

void local_affinity_backward_cpu(const float* grad, const float* feats, const float* affinity, const float* scale,
                                 float* grad_feats, FeatureShape shape, const AffinityOptions& options, int threads) {
  const Neighbourhood hood = make_neighbourhood(options.radius);
  const AffinityProblem problem = problem_of(shape, options, hood);
  const size_t plane = size_t(shape.height) * shape.width;
  const size_t image_in = shape.dim * plane, image_out = hood.count * plane;
  if (shape.batch == 0 || plane == 0) return;
  threads = worthwhile_threads(usable_threads(threads), pair_work(shape, hood) / double(shape.batch), kPairsPerThread);
  const bool cosine = options.metric == AffinityMetric::kCosine;
  const size_t margin = size_t(hood.radius - 1) * pair_line(int(shape.width)), plane_size = pair_plane(problem);
  const Buffer<float> pairs(hood.count * plane_size), work(kBackwardPack * threads), norms(cosine ? plane : 0);
  for (int k = 0; k < hood.count; ++k) std::memset(pairs.get() + k * plane_size, 0, margin * sizeof(float));
  expect_writes(grad_feats, shape.batch * image_in * sizeof(float));
  parallel(threads, [&](const Team& team) {
    const int first = int(team.begin(shape.height)), end = int(team.end(shape.height));
    for (int64_t b = 0; b < shape.batch; ++b) {
      const float* const image = feats + b * image_in;
      for (int y = first; y < end; ++y) {
        kernels().pair_weights(problem, grad + b * image_out, affinity + b * image_out, scale[b], pairs.get(), y);
      }
      if (cosine) kernels().inverse_norms(problem, image, norms.get(), first, end);
      team.barrier();
      const std::vector<ImageTile> tiles = tiles_of(b, 1, shape, team.threads);
      const int64_t last = team.end(int64_t(tiles.size()));
      for (int64_t i = team.begin(int64_t(tiles.size())); i < last; ++i) {
        kernels().backward_tile(problem, tiles[i].tile, image, cosine ? norms.get() : nullptr, pairs.get(),
                                grad_feats + b * image_in, work.get() + kBackwardPack * team.thread);
      }
      team.barrier();
    }
  });
}

}  // namespace wsss
