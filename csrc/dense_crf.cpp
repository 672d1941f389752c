#include "dense_crf.h"

#include <algorithm>
#include <atomic>
#include <exception>
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

  double blur_work() const { return double(lattice_.point_count) * row_ * lattice_.vertices; }

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

// Tiles to whichever thread is free: the result does not depend on who takes which.
class Tiles {
 public:
  explicit Tiles(const std::vector<LatticeTile>& tiles) : tiles_(tiles) {}

  // f(tile, index) for every tile; start_over() before the next time, with all threads past this one.
  template <class Body>
  void share(Body&& body) {
    for (int64_t t; (t = next_.fetch_add(1, std::memory_order_relaxed)) < int64_t(tiles_.size());) body(tiles_[t], t);
  }
  void start_over(const Team& team) {
    if (team.thread == 0) next_.store(0, std::memory_order_relaxed);
  }

 private:
  const std::vector<LatticeTile>& tiles_;
  std::atomic<int64_t> next_{0};
};

// Values that blurring touches up to which meeting after every axis costs more than the other threads bring.
constexpr double kBlurAlone = 6e5;

// What the tiles splatted -> blurred values of the points; all threads have met before and after.
void filter(const Team& team, Tiles& tiles, const Term* const* terms, int count) {
  team.barrier();
  tiles.start_over(team);
  double work = 0;
  for (int t = 0; t < count; ++t) work += terms[t]->blur_work();
  if (work <= kBlurAlone) {  // a thread a lattice
    for (int t = team.thread; t < count; t += team.threads) {
      terms[t]->combine(alone());
      for (int axis = 0; axis < kMaxLatticeVertices; ++axis) terms[t]->blur(alone(), axis);
    }
  } else {
    for (int t = 0; t < count; ++t) terms[t]->combine(team);
    for (int axis = 0; axis < kMaxLatticeVertices; ++axis) {
      team.barrier();
      for (int t = 0; t < count; ++t) terms[t]->blur(team, axis);
    }
  }
  team.barrier();
}

// Values of an image that one thread may take for itself beside others: 64 MB.
constexpr double kValuesAlone = 16e6;

// image(index, threads) for every image of a batch: side by side, a thread each, as long as there is one for every
// thread (they need not wait for each other then), the rest one after the other with all threads.
template <class Image>
void for_each_image(const CrfShape& shape, int row, int threads, Image&& image) {
  const bool alone = double(shape.height) * double(shape.width) * row <= kValuesAlone;
  const int wished = usable_threads(threads);
  const int64_t side_by_side = alone && wished > 1 ? shape.batch / wished * wished : 0;
  if (side_by_side > 0) {
    std::vector<std::exception_ptr> failures(wished);
    parallel(wished, [&](const Team& team) {
      try {
        for (int64_t b = team.begin(side_by_side); b < team.end(side_by_side); ++b) image(b, 1);
      } catch (...) {
        failures[team.thread] = std::current_exception();
      }
    });
    for (const std::exception_ptr& failure : failures) {
      if (failure) std::rethrow_exception(failure);
    }
  }
  for (int64_t b = side_by_side; b < shape.batch; ++b) image(b, threads_for(shape, threads));
}

// Images of one size. The Gaussian's lattice depends on that alone: it is built once.
class Crf {
 public:
  Crf(const CrfShape& shape, const CrfOptions& options, int threads)
      : shape_(shape),
        options_(options),
        tiles_(lattice_tiles(shape.height, shape.width)),
        row_(lattice_kernels().row_floats(shape.labels)) {
    if (options.iterations == 0 || options.gaussian_compat == 0) return;
    const float* const sigma = options.gaussian_sigma;
    gaussian_.emplace(LatticeSpace{2, shape.height, shape.width, {sigma[0], sigma[1]}}, tiles_);
    gaussian_->build(nullptr, true, threads_for(shape, threads));
  }

  int row() const { return row_; }

  void infer(const float* image, const float* unary, float* out, int threads) const {
    const LatticeKernels& kernels = lattice_kernels();
    const int row = row_;
    std::optional<Lattice> bilateral;
    std::optional<Term> gaussian_term, bilateral_term;
    if (gaussian_) gaussian_term.emplace(*gaussian_, row, options_.gaussian_compat);
    if (options_.iterations > 0 && options_.bilateral_compat != 0) {
      const float* const sigma = options_.bilateral_sigma;
      bilateral.emplace(
          LatticeSpace{5, shape_.height, shape_.width, {sigma[0], sigma[1], sigma[2], sigma[3], sigma[4]}}, tiles_);
      bilateral->build(image, true, threads);
      bilateral_term.emplace(*bilateral, row, options_.bilateral_compat);
    }
    const Buffer<float> energies(size_t(shape_.height) * shape_.width * row);
    const Buffer<float> scratch(lattice_scratch(row) * threads);
    const Term* terms[2];
    MeanFieldPass pass{{}, 0, false, false, energies.get(), row};
    for (const std::optional<Term>* term : {&gaussian_term, &bilateral_term}) {
      if (!*term) continue;
      terms[pass.term_count] = &**term;
      pass.terms[pass.term_count++] = (*term)->kernel_term();
    }
    const int64_t iterations = pass.term_count ? options_.iterations : 0;
    Tiles tiles(tiles_);
    parallel(threads, [&](const Team& team) {
      float* const own = scratch.get() + lattice_scratch(row) * team.thread;
      for (int64_t i = 0; i <= iterations; ++i) {
        MeanFieldPass now = pass;
        now.slices = i > 0;
        now.splats = i < iterations;
        tiles.share([&](const LatticeTile& tile, int64_t t) {
          if (i == 0) {
            kernels.pack(unary, nullptr, -1, -std::numeric_limits<float>::infinity(), shape_.labels, shape_.height,
                         shape_.width, tile, energies.get(), row);
          }
          kernels.mean_field(now, tile, t, own);
          if (i == iterations) {
            kernels.unpack(energies.get(), nullptr, 1, shape_.labels, shape_.height, shape_.width, tile, out, row);
          }
        });
        if (now.splats) filter(team, tiles, terms, pass.term_count);
      }
    });
  }

 private:
  CrfShape shape_;
  CrfOptions options_;
  std::vector<LatticeTile> tiles_;
  int row_;
  std::optional<Lattice> gaussian_;
};

}  // namespace

void dense_crf_cpu(const float* image, const float* unary, float* out, CrfShape shape, const CrfOptions& options,
                   int threads) {
  const size_t plane = size_t(shape.height) * shape.width;
  if (shape.batch == 0 || shape.labels == 0 || plane == 0) return;
  expect_writes(out, size_t(shape.batch) * shape.labels * plane * sizeof(float));
  const Crf crf(shape, options, threads);
  for_each_image(shape, crf.row(), threads, [&](int64_t b, int image_threads) {
    const size_t at = size_t(b) * shape.labels * plane;
    crf.infer(image + size_t(b) * 3 * plane, unary + at, out + at, image_threads);
  });
}

void dense_energy_cpu(const float* image, const float* probs, const float* roi, float* loss, float* slope,
                      CrfShape shape, const float* sigma, int threads) {
  *loss = 0;
  const size_t plane = size_t(shape.height) * shape.width;
  if (shape.batch == 0 || shape.labels == 0 || plane == 0) return;
  if (slope) expect_writes(slope, size_t(shape.batch) * shape.labels * plane * sizeof(float));
  const LatticeKernels& kernels = lattice_kernels();
  const std::vector<LatticeTile> all_tiles = lattice_tiles(shape.height, shape.width);
  const int row = kernels.row_floats(shape.labels);
  std::vector<double> sums(size_t(shape.batch) * all_tiles.size());
  for_each_image(shape, row, threads, [&](int64_t b, int image_threads) {
    Lattice lattice(LatticeSpace{5, shape.height, shape.width, {sigma[0], sigma[1], sigma[2], sigma[3], sigma[4]}},
                    all_tiles);
    lattice.build(image + size_t(b) * 3 * plane, false, image_threads);
    const Buffer<float> pixels(plane * row);
    const Term term(lattice, row, 1);
    const Term* const terms[] = {&term};
    const size_t at = size_t(b) * shape.labels * plane;
    const float* const weight = roi ? roi + size_t(b) * plane : nullptr;
    Tiles tiles(all_tiles);
    parallel(image_threads, [&](const Team& team) {
      tiles.share([&](const LatticeTile& tile, int64_t t) {
        kernels.pack(probs + at, weight, 1, 0, shape.labels, shape.height, shape.width, tile, pixels.get(), row);
        kernels.splat(term.kernel_term(), pixels.get(), row, tile, t);
      });
      filter(team, tiles, terms, 1);
      tiles.share([&](const LatticeTile& tile, int64_t t) {
        sums[size_t(b) * all_tiles.size() + t] = kernels.slice(term.kernel_term(), pixels.get(), row, tile, t);
        if (!slope) return;
        kernels.unpack(pixels.get(), weight, float(-2.0 / double(shape.batch)), shape.labels, shape.height, shape.width,
                       tile, slope + at, row);
      });
    });
  });
  double total = 0;
  for (const double sum : sums) total += sum;  // in one order, whatever the number of threads
  *loss = float(-total / double(shape.batch));
}

}  // namespace wsss
