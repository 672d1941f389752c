#include "soft_histogram.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "common/buffer.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "soft_histogram_kernels.h"

namespace wsss {

WSSS_FOR_EACH_ISA(extern const HistogramKernels histogram_kernels;)

namespace {

const HistogramKernels& kernels() { return WSSS_CHOOSE_ISA(histogram_kernels); }

constexpr double kProductsPerThread = 2e6;  // some tens of microseconds
// Pixels over which a gradient is summed before it joins the rest; a multiple of every tile, so that no instruction set
// splits one. Its factor for a block of words stays in the first cache.
constexpr int kSpan = 96;
constexpr int kSpansPerThread = 4;  // between two meetings of the threads
constexpr int kChannels = 512;      // of the features' gradient at once: the second cache
constexpr int kWordsTurned = 16;    // whose gradients are turned to rows of their own at once: a cache line of each
constexpr double kZero = 1e-12;     // a vector no longer than this counts as zero

int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t padded(int64_t count, int64_t size) { return parts(count, size) * size; }

// A factor of a product in the order in which `multiply` reads it: [depth / 128, rows / panel, 128, panel].
class Panels {
 public:
  Panels(int64_t rows, int64_t depth)
      : rows_(padded(rows, kernels().panel)), depth_(depth), data_(size_t(rows_) * depth) {}

  template <class Value>  // value(row, k), asked for padding rows too
  void fill(const Team& team, const Value& value) const {
    const int panel = kernels().panel;
    const int64_t count = rows_ / panel;
    for (int64_t i = team.begin(count); i < team.end(count); ++i) {
      for (int64_t first = 0; first < depth_; first += kHistogramDepth) {
        const int64_t depth = std::min<int64_t>(kHistogramDepth, depth_ - first);
        float* out = data_.get() + first * rows_ + i * depth * panel;
        for (int64_t k = 0; k < depth; ++k) {
          for (int j = 0; j < panel; ++j) *out++ = value(i * panel + j, first + k);
        }
      }
    }
  }
  int64_t rows() const { return rows_; }
  const float* at(int64_t row, int64_t k) const {  // row a multiple of the panel, k of kHistogramDepth
    return data_.get() + k * rows_ + row * std::min<int64_t>(kHistogramDepth, depth_ - k);
  }

 private:
  int64_t rows_, depth_;
  Buffer<float> data_;
};

// In double, in sums of their own: one after the other they would wait for each other.
double dot(const float* a, const float* b, int64_t count) {
  constexpr int kSums = 8;
  double sums[kSums] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int k = 0; k < kSums; ++k) sums[k] += double(a[i + k]) * b[i + k];
  }
  for (; i < count; ++i) sum += double(a[i]) * b[i];
  for (int k = 0; k < kSums; ++k) sum += sums[k];
  return sum;
}

// The words at unit length.
struct Units {
  Units(const float* codebook, const HistogramShape& shape)
      : words(codebook),
        shape(shape),
        inverse_norm(size_t(shape.words)),
        rows(padded(shape.words, std::max(kernels().panel, kernels().lanes))),
        panels(rows, shape.dim) {}

  void normalise(const Team& team) {
    for (int64_t m = team.begin(shape.words); m < team.end(shape.words); ++m) {
      const double norm = std::sqrt(dot(words + m * shape.dim, words + m * shape.dim, shape.dim));
      inverse_norm[m] = norm <= kZero ? 0.0f : float(1 / norm);
    }
  }
  float operator()(int64_t m, int64_t d) const {
    return m < shape.words ? words[m * shape.dim + d] * inverse_norm[m] : 0.0f;
  }
  void pack(const Team& team) {
    panels.fill(team, [this](int64_t m, int64_t d) { return (*this)(m, d); });
  }

  const float* words;
  HistogramShape shape;
  std::vector<float> inverse_norm;
  int64_t rows;  // words and padding: whole panels and whole vectors
  Panels panels;
};

// What a thread works in, [tile] values each where nothing else is said.
struct Scratch {
  Scratch(const Units& units, bool turned)
      : feats(size_t(kHistogramDepth) * kernels().tile),
        scores(size_t(units.rows) * kernels().tile),
        products(turned ? size_t(padded(kChannels, kernels().panel)) * kernels().tile : 0),
        squares(kernels().tile),
        inverse_norm(kernels().tile),
        log_sum(kernels().tile),
        along(kernels().tile),
        pull(kernels().tile),
        chosen(kernels().tile) {}

  ScoreTile tile(const HistogramShape& shape, int pixels, float temperature) const {
    return {scores.get(), int(shape.words), vectors(pixels), temperature, inverse_norm.get(), log_sum.get()};
  }
  static int vectors(int pixels) { return int(parts(pixels, kernels().lanes)); }

  Buffer<float> feats, scores;  // [128, tile], [words, tile]
  Buffer<float> products;       // [512, tile]
  Buffer<float> squares, inverse_norm, log_sum, along, pull;
  Buffer<int32_t> chosen;
};

// Products of all words with a tile of pixels, into scratch.scores; the pixels' squares.
void multiply_words(const Units& units, const float* feats, int pixels, const Scratch& scratch) {
  const int64_t dim = units.shape.dim, stride = units.shape.pixels;
  std::fill_n(scratch.squares.get(), kernels().tile, 0.0f);
  for (int64_t d = 0; d < dim; d += kHistogramDepth) {
    const int depth = int(std::min<int64_t>(kHistogramDepth, dim - d));
    const int64_t coming = std::min<int64_t>(kHistogramDepth, dim - d - depth);
    kernels().load(feats + d * stride, stride, depth, pixels, scratch.feats.get(), scratch.squares.get());
    kernels().multiply(units.panels.at(0, d), int(units.rows / kernels().panel), scratch.feats.get(), depth,
                       Scratch::vectors(pixels), scratch.scores.get(), d == 0,
                       NextRows{feats + (d + depth) * stride, stride, int(coming)});
  }
}

// Tiles of all images, the next to whichever thread is free.
struct Tiles {
  explicit Tiles(const HistogramShape& shape)
      : pixels(shape.pixels), an_image(parts(shape.pixels, kernels().tile)), count(shape.batch * an_image) {}
  int64_t image(int64_t tile) const { return tile / an_image; }
  int64_t first(int64_t tile) const { return tile % an_image * kernels().tile; }
  int size(int64_t tile) const { return int(std::min<int64_t>(kernels().tile, pixels - first(tile))); }

  int64_t pixels, an_image, count;
};

int thread_count(int threads, const HistogramShape& shape) {
  const double products = double(shape.batch) * double(shape.pixels) * double(shape.words) * double(shape.dim);
  return worthwhile_threads(usable_threads(threads), products, kProductsPerThread);
}

}  // namespace

void soft_histogram_cpu(const float* feats, const float* codebook, float* histogram, uint8_t* words,
                        int64_t* assignment, float* inverse_norm, float* log_sum, HistogramShape shape,
                        float temperature, int threads) {
  std::fill_n(words, shape.batch * shape.words, uint8_t(0));
  std::fill_n(histogram, shape.batch * shape.words, 0.0f);
  if (shape.batch == 0 || shape.pixels == 0) return;
  threads = thread_count(threads, shape);
  const Tiles tiles(shape);
  Units units(codebook, shape);
  const Buffer<float> bins(size_t(tiles.count) * shape.words);
  std::vector<Scratch> scratches;
  for (int t = 0; t < threads; ++t) scratches.emplace_back(units, false);
  std::atomic<int64_t> next{0};
  parallel(threads, [&](const Team& team) {
    units.normalise(team);
    team.barrier();
    units.pack(team);
    team.barrier();
    const Scratch& scratch = scratches[team.thread];
    for (int64_t t = next++; t < tiles.count; t = next++) {
      const int64_t b = tiles.image(t), first = tiles.first(t), at = b * shape.pixels + first;
      const int pixels = tiles.size(t);
      multiply_words(units, feats + b * shape.dim * shape.pixels + first, pixels, scratch);
      for (int p = 0; p < kernels().tile; ++p) {
        const float norm = std::sqrt(scratch.squares.get()[p]);
        scratch.inverse_norm.get()[p] = norm <= float(kZero) ? 0.0f : 1 / norm;
      }
      kernels().softmax(scratch.tile(shape, pixels, temperature), pixels, scratch.chosen.get(),
                        bins.get() + t * shape.words);
      std::copy_n(scratch.chosen.get(), pixels, assignment + at);
      std::copy_n(scratch.inverse_norm.get(), pixels, inverse_norm + at);
      std::copy_n(scratch.log_sum.get(), pixels, log_sum + at);
    }
    team.barrier();
    for (int64_t b = team.begin(shape.batch); b < team.end(shape.batch); ++b) {
      for (int64_t m = 0; m < shape.words; ++m) {
        double sum = 0;
        for (int64_t t = 0; t < tiles.an_image; ++t) sum += bins.get()[(b * tiles.an_image + t) * shape.words + m];
        histogram[b * shape.words + m] = float(sum);
      }
      for (int64_t p = 0; p < shape.pixels; ++p) words[b * shape.words + assignment[b * shape.pixels + p]] = 1;
    }
  });
}

void soft_histogram_backward_cpu(const float* grad, const float* feats, const float* codebook,
                                 const float* inverse_norm, const float* log_sum, float* grad_feats,
                                 float* grad_codebook, HistogramShape shape, float temperature, int threads) {
  if (shape.batch == 0 || shape.pixels == 0) {
    if (grad_codebook) std::fill_n(grad_codebook, shape.words * shape.dim, 0.0f);
    return;
  }
  threads = thread_count(threads, shape);
  const int lanes = kernels().lanes, tile = kernels().tile, block = kernels().block;
  Units units(codebook, shape);
  const Panels turned(grad_feats ? shape.dim : 0, units.rows);
  const int64_t blocks = parts(units.rows, block), factor_size = blocks * kSpan * block;
  const int64_t spans_an_image = parts(shape.pixels, kSpan), spans = shape.batch * spans_an_image;
  const int64_t chunk = std::min<int64_t>(spans, int64_t(threads) * kSpansPerThread), chunks = parts(spans, chunk);
  const Buffer<float> factors(grad_codebook ? size_t(chunk) * factor_size : 0);
  const Buffer<float> sums(grad_codebook ? size_t(shape.dim) * units.rows : 0);
  const Buffer<float> word_sums(grad_codebook ? size_t(threads) * kWordsTurned * shape.dim : 0);
  std::vector<Scratch> scratches;
  for (int t = 0; t < threads; ++t) scratches.emplace_back(units, grad_feats != nullptr);
  std::vector<std::atomic<int64_t>> next(chunks);
  for (auto& counter : next) counter = 0;
  const int tiles_a_span = kSpan / tile;
  const auto span_pixels = [&](int64_t span) {
    return int(std::min<int64_t>(kSpan, shape.pixels - span % spans_an_image * kSpan));
  };
  parallel(threads, [&](const Team& team) {
    units.normalise(team);
    team.barrier();
    units.pack(team);
    if (grad_feats) turned.fill(team, [&](int64_t d, int64_t m) { return d < shape.dim ? units(m, d) : 0.0f; });
    const int64_t groups = parts(shape.dim, kernels().reduce_rows);
    const int64_t first_row = team.begin(groups) * kernels().reduce_rows;
    const int64_t last_row = std::min(team.end(groups) * kernels().reduce_rows, shape.dim);
    if (grad_codebook) std::fill(sums.get() + first_row * units.rows, sums.get() + last_row * units.rows, 0.0f);
    team.barrier();
    const Scratch& scratch = scratches[team.thread];
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t first_span = c * chunk, last_span = std::min(spans, first_span + chunk);
      const int64_t tiles = (last_span - first_span) * tiles_a_span;
      for (int64_t t = next[c]++; t < tiles; t = next[c]++) {
        const int64_t span = first_span + t / tiles_a_span, b = span / spans_an_image;
        const int offset = int(t % tiles_a_span) * tile, pixels = std::min(tile, span_pixels(span) - offset);
        if (pixels <= 0) continue;
        const int64_t first = span % spans_an_image * kSpan + offset, at = b * shape.pixels + first;
        const float* const own = feats + b * shape.dim * shape.pixels + first;
        multiply_words(units, own, pixels, scratch);
        std::fill_n(scratch.inverse_norm.get(), tile, 0.0f);
        std::fill_n(scratch.log_sum.get(), tile, 0.0f);
        std::copy_n(inverse_norm + at, pixels, scratch.inverse_norm.get());
        std::copy_n(log_sum + at, pixels, scratch.log_sum.get());
        const ScoreTile scores = scratch.tile(shape, pixels, temperature);
        kernels().slope(scores, grad + b * shape.words, scratch.along.get());
        std::fill_n(scratch.scores.get() + shape.words * tile, (units.rows - shape.words) * tile, 0.0f);
        if (grad_codebook) {
          float* const factor = factors.get() + (span - first_span) * factor_size;
          kernels().transpose(scores, int(units.rows), kSpan, factor + int64_t(offset) * block);
        }
        if (!grad_feats) continue;
        for (int p = 0; p < tile; ++p) {
          const float norm = scratch.inverse_norm.get()[p];
          scratch.pull.get()[p] = norm * norm * scratch.along.get()[p];
        }
        for (int64_t d = 0; d < shape.dim; d += kChannels) {
          const int64_t rows = std::min<int64_t>(kChannels, shape.dim - d);
          for (int64_t m = 0; m < units.rows; m += kHistogramDepth) {
            const int depth = int(std::min<int64_t>(kHistogramDepth, units.rows - m));
            kernels().multiply(turned.at(d, m), int(parts(rows, kernels().panel)), scratch.scores.get() + m * tile,
                               depth, scores.vectors, scratch.products.get(), m == 0, NextRows{nullptr, 0, 0});
          }
          kernels().settle(scratch.products.get(), own + d * shape.pixels,
                           grad_feats + (b * shape.dim + d) * shape.pixels + first, shape.pixels, int(rows), pixels,
                           scratch.inverse_norm.get(), scratch.pull.get());
        }
      }
      team.barrier();
      if (!grad_codebook) continue;
      for (int64_t span = first_span; span < last_span; ++span) {
        const float* const own =
            feats + span / spans_an_image * shape.dim * shape.pixels + span % spans_an_image * kSpan;
        const float* const factor = factors.get() + (span - first_span) * factor_size;
        for (int64_t m = 0; m < units.rows; m += block) {
          const int vectors = int(std::min<int64_t>(block, units.rows - m)) / lanes;
          for (int64_t d = first_row; d < last_row; d += kernels().reduce_rows) {
            const int rows = int(std::min<int64_t>(kernels().reduce_rows, last_row - d));
            kernels().reduce(own + d * shape.pixels, shape.pixels, rows, factor + m * kSpan, block, vectors,
                             span_pixels(span), sums.get() + d * units.rows + m, units.rows);
          }
        }
      }
      team.barrier();
    }
    if (!grad_codebook) return;
    // From the unit words to the words: what lies along a word does not turn it.
    const int64_t word_blocks = parts(shape.words, kWordsTurned);
    for (int64_t m = team.begin(word_blocks) * kWordsTurned; m < team.end(word_blocks) * kWordsTurned;
         m += kWordsTurned) {
      const int there = int(std::min<int64_t>(kWordsTurned, shape.words - m));
      float* const by_words = word_sums.get() + int64_t(team.thread) * kWordsTurned * shape.dim;
      for (int64_t d = 0; d < shape.dim; ++d) {
        for (int i = 0; i < there; ++i) by_words[i * shape.dim + d] = sums.get()[d * units.rows + m + i];
      }
      for (int i = 0; i < there; ++i) {
        const float* const word = codebook + (m + i) * shape.dim;
        const float* const sum = by_words + i * shape.dim;
        const float norm = units.inverse_norm[m + i], along = float(norm * dot(word, sum, shape.dim)) * norm;
        float* const target = grad_codebook + (m + i) * shape.dim;
        for (int64_t d = 0; d < shape.dim; ++d) target[d] = norm * (sum[d] - word[d] * along);
      }
    }
  });
}

}  // namespace wsss
