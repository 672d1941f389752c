#include "dense_crf.h"

#include <cmath>
#include <limits>
#include <optional>

#include "common/buffer.h"
#include "common/parallel.h"
#include "permutohedral.h"

namespace wsss {

namespace {

// Values a thread should have to filter: some tens of microseconds.
constexpr double kValuesPerThread = 1e4;

int threads_for(const CrfShape& shape, int threads) {
  const double values = double(shape.labels) * double(shape.height) * double(shape.width);
  return worthwhile_threads(usable_threads(threads), values, kValuesPerThread);
}

// A lattice with the tables its filter works in.
class Term {
 public:
  Term(const Lattice& lattice, int row, float compat)
      : lattice_(lattice.view()),
        row_(row),
        scale_(compat * lattice_.alpha),
        values_(size_t(lattice_.point_count) * row),
        rows_(size_t(lattice_.rows) * row) {}

  LatticeTerm kernel_term() const { return {&lattice_, values_.get(), rows_.get()}; }

  void combine(const Team& team) const {
    const uint32_t begin = uint32_t(team.begin(lattice_.point_count)), end = uint32_t(team.end(lattice_.point_count));
    lattice_kernels().combine(lattice_, rows_.get(), values_.get(), row_, scale_, begin, end);
  }
  void blur(const Team& team, int axis) const {
    if (axis >= lattice_.vertices) return;
    const uint32_t* const chain = lattice_.chain[axis];
    lattice_kernels().blur(chain, chain_range(team, chain, lattice_.chain_size[axis]), values_.get(), row_);
  }

 private:
  const LatticeView& lattice_;
  int row_;
  float scale_;
  Buffer<float> values_, rows_;
};

// What the tiles splatted -> blurred values of the points; all threads have met before and after.
void filter(const Team& team, const Term* const* terms, int count) {
  team.barrier();
  for (int t = 0; t < count; ++t) terms[t]->combine(team);
  for (int axis = 0; axis < kMaxLatticeVertices; ++axis) {
    team.barrier();
    for (int t = 0; t < count; ++t) terms[t]->blur(team, axis);
  }
  team.barrier();
}

// f(tile, index) for this thread's tiles.
template <class Body>
void own_tiles(const Team& team, const std::vector<LatticeTile>& tiles, Body&& body) {
  const int64_t end = team.end(int64_t(tiles.size()));
  for (int64_t t = team.begin(int64_t(tiles.size())); t < end; ++t) body(tiles[t], t);
}

}  // namespace

void dense_crf_cpu(const float* image, const float* unary, float* out, CrfShape shape, const CrfOptions& options,
                   int threads) {
  const size_t plane = size_t(shape.height) * shape.width;
  if (shape.batch == 0 || shape.labels == 0 || plane == 0) return;
  threads = threads_for(shape, threads);
  const LatticeKernels& kernels = lattice_kernels();
  const std::vector<LatticeTile> tiles = lattice_tiles(shape.height, shape.width);
  const int row = kernels.row_floats(shape.labels);
  const float nothing = -std::numeric_limits<float>::infinity();

  // The Gaussian's lattice depends on the size alone.
  std::optional<Lattice> gaussian, bilateral;
  std::optional<Term> gaussian_term, bilateral_term;
  if (options.iterations > 0 && options.gaussian_compat != 0) {
    gaussian.emplace(LatticeSpace{2, shape.height, shape.width, {options.gaussian_sigma[0], options.gaussian_sigma[1]}},
                     tiles);
    gaussian->build(nullptr, threads);
    gaussian->normalize(threads);
    gaussian_term.emplace(*gaussian, row, options.gaussian_compat);
  }
  const Buffer<float> energies(plane * row);
  expect_writes(out, size_t(shape.batch) * shape.labels * plane * sizeof(float));
  const Buffer<float> scratch(lattice_scratch(row) * threads);

  for (int64_t b = 0; b < shape.batch; ++b) {
    if (options.iterations > 0 && options.bilateral_compat != 0) {
      const float* const sigma = options.bilateral_sigma;
      bilateral_term.reset();
      bilateral.emplace(LatticeSpace{5, shape.height, shape.width, {sigma[0], sigma[1], sigma[2], sigma[3], sigma[4]}},
                        tiles);
      bilateral->build(image + size_t(b) * 3 * plane, threads);
      bilateral->normalize(threads);
      bilateral_term.emplace(*bilateral, row, options.bilateral_compat);
    }
    const Term* terms[2];
    MeanFieldPass pass{{}, 0, false, false, energies.get(), row};
    for (const std::optional<Term>* term : {&gaussian_term, &bilateral_term}) {
      if (!*term) continue;
      terms[pass.term_count] = &**term;
      pass.terms[pass.term_count++] = (*term)->kernel_term();
    }
    const size_t at = size_t(b) * shape.labels * plane;
    const int64_t iterations = pass.term_count ? options.iterations : 0;
    parallel(threads, [&](const Team& team) {
      float* const own = scratch.get() + lattice_scratch(row) * team.thread;
      own_tiles(team, tiles, [&](const LatticeTile& tile, int64_t) {
        kernels.pack(unary + at, nullptr, -1, nothing, shape.labels, shape.height, shape.width, tile, energies.get(),
                     row);
      });
      for (int64_t i = 0; i <= iterations; ++i) {
        MeanFieldPass now = pass;
        now.slices = i > 0;
        now.splats = i < iterations;
        own_tiles(team, tiles, [&](const LatticeTile& tile, int64_t t) { kernels.mean_field(now, tile, t, own); });
        if (now.splats) filter(team, terms, pass.term_count);
      }
      own_tiles(team, tiles, [&](const LatticeTile& tile, int64_t) {
        kernels.unpack(energies.get(), nullptr, 1, shape.labels, shape.height, shape.width, tile, out + at, row);
      });
    });
  }
}

void dense_energy_cpu(const float* image, const float* probs, const float* roi, float* loss, float* slope,
                      CrfShape shape, const float* sigma, int threads) {
  *loss = 0;
  const size_t plane = size_t(shape.height) * shape.width;
  if (shape.batch == 0 || shape.labels == 0 || plane == 0) return;
  threads = threads_for(shape, threads);
  const LatticeKernels& kernels = lattice_kernels();
  const std::vector<LatticeTile> tiles = lattice_tiles(shape.height, shape.width);
  const int row = kernels.row_floats(shape.labels);
  const Buffer<float> pixels(plane * row);
  if (slope) expect_writes(slope, size_t(shape.batch) * shape.labels * plane * sizeof(float));
  std::vector<double> sums(tiles.size());
  double total = 0;
  for (int64_t b = 0; b < shape.batch; ++b) {
    Lattice lattice(LatticeSpace{5, shape.height, shape.width, {sigma[0], sigma[1], sigma[2], sigma[3], sigma[4]}},
                    tiles);
    lattice.build(image + size_t(b) * 3 * plane, threads);
    const Term term(lattice, row, 1);
    const Term* const terms[] = {&term};
    const size_t at = size_t(b) * shape.labels * plane;
    const float* const weight = roi ? roi + size_t(b) * plane : nullptr;
    parallel(threads, [&](const Team& team) {
      own_tiles(team, tiles, [&](const LatticeTile& tile, int64_t t) {
        kernels.pack(probs + at, weight, 1, 0, shape.labels, shape.height, shape.width, tile, pixels.get(), row);
        kernels.splat(term.kernel_term(), pixels.get(), row, tile, t);
      });
      filter(team, terms, 1);
      own_tiles(team, tiles, [&](const LatticeTile& tile, int64_t t) {
        sums[t] = kernels.slice(term.kernel_term(), pixels.get(), row, tile, t);
        if (!slope) return;
        kernels.unpack(pixels.get(), weight, float(-2.0 / double(shape.batch)), shape.labels, shape.height, shape.width,
                       tile, slope + at, row);
      });
    });
    for (const double sum : sums) total += sum;  // in one order, whatever the number of threads
  }
  *loss = float(-total / double(shape.batch));
}

}  // namespace wsss
