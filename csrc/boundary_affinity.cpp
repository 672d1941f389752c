#include "boundary_affinity.h"

#include <algorithm>
#include <cstring>

#include "boundary_affinity_kernels.h"
#include "boundary_path_tree.h"
#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace wsss {

WSSS_FOR_EACH_ISA(extern const BoundaryKernels boundary_kernels;)

namespace {

const BoundaryKernels& kernels() { return WSSS_CHOOSE_ISA(boundary_kernels); }

// Steps of paths a thread should have to take: some tens of microseconds.
constexpr double kStepsPerThread = 3e5;

// Results from here on leave the second-level cache before they are read again.
constexpr size_t kStreamedBytes = size_t(8) << 20;

struct Bands {
  int64_t an_image, all;
  explicit Bands(const BoundaryShape& shape)
      : an_image((shape.height + kBandRows - 1) / kBandRows), all(shape.batch * an_image) {}
};

struct Band {
  int64_t image;
  int y, y_end;
  Band(int64_t index, const Bands& bands, const BoundaryShape& shape)
      : image(index / bands.an_image),
        y(int(index % bands.an_image) * kBandRows),
        y_end(int(std::min<int64_t>(y + kBandRows, shape.height))) {}
};

double work(const BoundaryShape& shape, const PathTree& tree) {
  return double(shape.batch) * double(shape.height) * double(shape.width) * tree.steps;
}

}  // namespace

void boundary_affinity_cpu(const float* boundary, float* out, BoundaryShape shape, int radius, int threads) {
  const Neighbourhood hood = make_neighbourhood(radius);
  const size_t plane = size_t(shape.height) * shape.width;
  if (shape.batch == 0 || plane == 0 || hood.count == 0) return;
  const ptrdiff_t line = boundary_line(shape.width);
  const PathTreeMaker maker(radius, line);
  const PathTree tree = maker.tree();
  const size_t bytes = shape.batch * hood.count * plane * sizeof(float);
  const bool stream = bytes >= kStreamedBytes && uintptr_t(out) % 64 == 0 && shape.width * sizeof(float) % 64 == 0;
  const BoundaryProblem problem{int(shape.height), int(shape.width), radius, ptrdiff_t(plane), stream, &hood, &tree};
  const Bands bands(shape);
  threads = worthwhile_threads(usable_threads(threads), work(shape, tree), kStepsPerThread);
  const size_t packed = (kBandRows + radius - 1) * size_t(line);
  const Buffer<int32_t> keys(packed * threads);
  expect_writes(out, bytes);
  parallel(threads, [&](const Team& team) {
    int32_t* const mine = keys.get() + packed * team.thread;
    for (int64_t i = team.begin(bands.all); i < team.end(bands.all); ++i) {
      const Band band(i, bands, shape);
      kernels().pack(problem, boundary + band.image * plane, mine, band.y, band.y_end);
      kernels().forward(problem, mine, band.y, band.y_end, out + band.image * hood.count * plane);
    }
  });
}

void boundary_affinity_backward_cpu(const float* grad, const float* boundary, float* grad_boundary, BoundaryShape shape,
                                    int radius, int threads) {
  const Neighbourhood hood = make_neighbourhood(radius);
  const size_t plane = size_t(shape.height) * shape.width;
  if (shape.batch == 0 || plane == 0) return;
  if (hood.count == 0) {
    std::memset(grad_boundary, 0, shape.batch * plane * sizeof(float));
    return;
  }
  const ptrdiff_t line = boundary_line(shape.width);
  const PathTreeMaker maker(radius, line);
  const PathTree tree = maker.tree();
  const BoundaryProblem problem{int(shape.height), int(shape.width), radius, ptrdiff_t(plane), false, &hood, &tree};
  const Bands bands(shape);
  threads = worthwhile_threads(usable_threads(threads), work(shape, tree), kStepsPerThread);
  // Every band adds up the rows it reaches by itself; then a row of the result takes its bands in their order.
  const size_t reached = (kBandRows + radius - 1) * size_t(line), by_point = size_t(tree.point_count) * kPointLine;
  const Buffer<int32_t> keys(reached * threads);
  const Buffer<float> points(by_point * threads), sums(reached * bands.all);
  parallel(threads, [&](const Team& team) {
    int32_t* const my_keys = keys.get() + reached * team.thread;
    float* const my_points = points.get() + by_point * team.thread;
    std::memset(my_points, 0, by_point * sizeof(float));
    for (int64_t i = team.begin(bands.all); i < team.end(bands.all); ++i) {
      const Band band(i, bands, shape);
      float* const band_sums = sums.get() + reached * i;
      std::memset(band_sums, 0, reached * sizeof(float));
      kernels().pack(problem, boundary + band.image * plane, my_keys, band.y, band.y_end);
      kernels().backward(problem, my_keys, band.y, band.y_end, grad + band.image * hood.count * plane, my_points,
                         band_sums);
    }
    team.barrier();
    const int64_t rows = shape.batch * shape.height;
    for (int64_t row = team.begin(rows); row < team.end(rows); ++row) {
      const int64_t image = row / shape.height, y = row % shape.height;
      const float* parts[kMaxRadius / kBandRows + 2];
      int count = 0;
      for (int64_t b = std::max<int64_t>(0, y - radius + 1) / kBandRows; b <= y / kBandRows; ++b) {
        parts[count++] =
            sums.get() + reached * (image * bands.an_image + b) + (y - b * kBandRows) * line + kBoundaryMargin;
      }
      kernels().subtract_rows(grad_boundary + row * shape.width, parts, count, int(shape.width));
    }
  });
}

}  // namespace wsss
